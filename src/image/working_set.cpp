// See working_set.h. Offsets of fields are those of docs/format.md.
#include "image/working_set.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "base/little_endian.h"
#include "image/block_hash.h"
#include "image/directory_lock.h"
#include "image/layout.h"
#include "os/file.h"

namespace unmoor {
namespace {

constexpr std::array<uint8_t, 8> kMagic = {'u', 'n', 'm', 'o', 'o', 'r', 'W', 'S'};
constexpr size_t kHeaderSize = 48;
constexpr size_t kReservedBegin = 40;
constexpr size_t kChecksumSize = 8;  // at the end: of all bytes before it
constexpr size_t kIdSize = kLayerIdLength / 2;
constexpr size_t kRangeSize = 24;
constexpr uint64_t kMaxLayers = 1000;  // as in a manifest
constexpr Bytes kMaxSize(kHeaderSize + kMaxLayers * kIdSize + kMaxWorkingSetRanges * kRangeSize +
                         kChecksumSize);

constexpr uint64_t kLargestGap = 64 << 10;  // between ranges that are read as one

uint8_t HexDigit(char c) {
  return static_cast<uint8_t>(c <= '9' ? c - '0' : c - 'a' + 10);
}

std::string IdAt(std::span<const std::byte> bytes, size_t at) {
  std::string id;
  for (size_t i = 0; i < kIdSize; ++i) {
    id += fmt::format("{:02x}", std::to_integer<unsigned>(bytes[at + i]));
  }
  return id;
}

uint64_t Checksum(std::span<const std::byte> bytes) {
  return HashOf(bytes.first(bytes.size() - kChecksumSize));
}

Failure Damaged(const std::string& name, size_t offset, std::string_view what) {
  return UserError("{} is damaged at offset {}: {}", name, offset, what);
}

Result<> CheckHeader(std::span<const std::byte> bytes, const std::string& name) {
  if (bytes.size() < kHeaderSize + kChecksumSize)
    return Damaged(name, bytes.size(), "it is truncated");
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return UserError("{} is not a working set (bad magic at offset 0)", name);
  }
  if (const auto version = GetLittleEndian<uint32_t>(bytes, 8); version != kFormatVersion) {
    return UserError("{}: format version {} is not one this unmoor ({}) reads", name, version,
                     kFormatVersion);
  }
  const size_t checksum_at = bytes.size() - kChecksumSize;
  if (GetLittleEndian<uint64_t>(bytes, checksum_at) != Checksum(bytes)) {
    return Damaged(name, checksum_at, "it does not match its checksum");
  }
  if (GetLittleEndian<uint32_t>(bytes, 12) != kHeaderSize)
    return Damaged(name, 12, "bad header size");
  if (GetLittleEndian<uint64_t>(bytes, 16) > kMaxLayers)
    return Damaged(name, 16, "too many layers");
  if (GetLittleEndian<uint64_t>(bytes, 24) > kMaxWorkingSetRanges) {
    return Damaged(name, 24, "too many ranges");
  }
  return {};
}

}  // namespace

Bytes WorkingSet::size() const {
  Bytes total;
  for (const WorkingSetRange& range : ranges) total += range.range.size();
  return total;
}

std::vector<WorkingSetRange> MergeForReading(const std::vector<WorkingSetRange>& ranges) {
  std::vector<WorkingSetRange> merged;
  for (const WorkingSetRange& range : ranges) {
    if (!merged.empty() && merged.back().layer == range.layer &&
        merged.back().range.end <= range.range.begin &&
        (range.range.begin - merged.back().range.end).value <= kLargestGap) {
      merged.back().range.end = range.range.end;
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

std::vector<std::byte> EncodeWorkingSet(const WorkingSet& set) {
  const size_t table = kHeaderSize + set.layers.size() * kIdSize;
  std::vector<std::byte> bytes(table + set.ranges.size() * kRangeSize + kChecksumSize);
  std::memcpy(bytes.data(), kMagic.data(), kMagic.size());
  PutLittleEndian(bytes, 8, kFormatVersion);
  PutLittleEndian(bytes, 12, static_cast<uint32_t>(kHeaderSize));
  PutLittleEndian(bytes, 16, static_cast<uint64_t>(set.layers.size()));
  PutLittleEndian(bytes, 24, static_cast<uint64_t>(set.ranges.size()));
  PutLittleEndian(bytes, 32, set.size().value);
  for (size_t i = 0; i < set.layers.size(); ++i) {
    for (size_t d = 0; d < kIdSize; ++d) {
      bytes[kHeaderSize + i * kIdSize + d] = static_cast<std::byte>(
          HexDigit(set.layers[i][2 * d]) << 4 | HexDigit(set.layers[i][2 * d + 1]));
    }
  }
  for (size_t i = 0; i < set.ranges.size(); ++i) {
    const size_t at = table + i * kRangeSize;
    PutLittleEndian(bytes, at, static_cast<uint64_t>(set.ranges[i].layer));
    PutLittleEndian(bytes, at + 8, set.ranges[i].range.begin.value);
    PutLittleEndian(bytes, at + 16, set.ranges[i].range.size().value);
  }
  PutLittleEndian(bytes, bytes.size() - kChecksumSize, Checksum(bytes));
  return bytes;
}

Result<WorkingSet> DecodeWorkingSet(std::span<const std::byte> bytes, const std::string& name) {
  UNMOOR_TRY(CheckHeader(bytes, name));
  const auto layers = GetLittleEndian<uint64_t>(bytes, 16);
  const auto ranges = GetLittleEndian<uint64_t>(bytes, 24);
  const size_t table = kHeaderSize + layers * kIdSize;
  if (bytes.size() != table + ranges * kRangeSize + kChecksumSize) {
    return Damaged(name, bytes.size(), "it is not as long as its counts say");
  }
  const auto reserved = bytes.subspan(kReservedBegin, kHeaderSize - kReservedBegin);
  if (std::ranges::any_of(reserved, [](std::byte b) { return b != std::byte{}; })) {
    return Damaged(name, kReservedBegin, "reserved bytes are not 0");
  }
  WorkingSet set;
  for (size_t i = 0; i < layers; ++i) set.layers.push_back(IdAt(bytes, kHeaderSize + i * kIdSize));
  for (size_t i = 0; i < ranges; ++i) {
    const size_t at = table + i * kRangeSize;
    const auto layer = GetLittleEndian<uint64_t>(bytes, at);
    const auto offset = GetLittleEndian<uint64_t>(bytes, at + 8);
    const auto length = GetLittleEndian<uint64_t>(bytes, at + 16);
    if (layer >= layers) return Damaged(name, at, "a range of no layer");
    if (offset % kPageSize != 0 || length % kPageSize != 0 || length == 0 ||
        offset > kMaxLayerSize || length > kMaxLayerSize - offset) {
      return Damaged(name, at + 8, "an impossible range");
    }
    set.ranges.push_back(
        {static_cast<uint32_t>(layer), {FileOffset(offset), FileOffset(offset + length)}});
  }
  if (set.size().value != GetLittleEndian<uint64_t>(bytes, 32)) {
    return Damaged(name, 32, "the ranges do not add up");
  }
  return set;
}

Result<std::optional<WorkingSet>> ReadWorkingSet(const std::string& dir) {
  const std::string path = WorkingSetPath(dir);
  if (!Exists(path)) return std::optional<WorkingSet>();
  UNMOOR_ASSIGN(const std::string bytes, ReadRegularFile(path, kMaxSize));
  UNMOOR_ASSIGN(WorkingSet set, DecodeWorkingSet(std::as_bytes(std::span(bytes)), path));
  return std::optional(std::move(set));
}

Result<> WriteWorkingSet(const std::string& dir, const std::string& checkpoint_id,
                         const WorkingSet& set) {
  // Shared: programs may be restored from it meanwhile. Whoever exchanges the directory waits.
  UNMOOR_ASSIGN(const DirectoryLock lock, DirectoryLock::Take(dir, LockUse::kRead));
  UNMOOR_ASSIGN(const Manifest manifest, ReadManifest(dir));
  if (manifest.checkpoint_id != checkpoint_id) {
    return UserError("{} holds another checkpoint by now; the working set was not kept", dir);
  }
  const std::vector<std::byte> bytes = EncodeWorkingSet(set);
  const std::string path = WorkingSetPath(dir);
  const std::string fresh = path + std::string(kFreshSuffix);
  {
    UNMOOR_ASSIGN(const Fd fd, OpenFile(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW, 0600));
    UNMOOR_TRY(WriteStream(fd.get(), bytes, fresh));
    UNMOOR_TRY(SyncFd(fd.get(), fresh));
  }
  UNMOOR_TRY(Rename(fresh, path));
  return SyncPath(dir);
}

Result<> CheckWorkingSet(const WorkingSet& set, const Manifest& manifest, const std::string& name) {
  std::vector<Bytes> sizes;
  for (const std::string& id : set.layers) {
    const auto found = std::ranges::find(manifest.layers, id, &ManifestLayer::id);
    if (found == manifest.layers.end()) {
      return UserError("{} names layer {}, which is not one of this image", name, id);
    }
    sizes.push_back(found->pages_size);
  }
  for (const WorkingSetRange& range : set.ranges) {
    if (range.range.end.value > sizes[range.layer].value) {
      return UserError("{} names pages beyond the end of layer {}", name, set.layers[range.layer]);
    }
  }
  return {};
}

}  // namespace unmoor
