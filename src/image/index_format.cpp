// See index_format.h. Offsets of fields are those of docs/format.md.
#include "image/index_format.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <map>

#include "base/little_endian.h"
#include "image/block_hash.h"

namespace unmoor::index_format {
namespace {

constexpr std::array<uint8_t, 8> kMagic = {'u', 'n', 'm', 'o', 'o', 'r', 'I', 'X'};
constexpr size_t kReservedBegin = 96;
constexpr size_t kHeaderChecksumAt = 120;

template <class T>
void Put(std::span<std::byte> bytes, size_t at, T value) {
  PutLittleEndian(bytes, at, value);
}

template <class T>
T Get(std::span<const std::byte> bytes, size_t at) {
  return GetLittleEndian<T>(bytes, at);
}

uint8_t HexDigit(char c) {
  return static_cast<uint8_t>(c <= '9' ? c - '0' : c - 'a' + 10);
}

Failure Damaged(const std::string& name, size_t offset, std::string_view what) {
  return UserError("{} is damaged at offset {}: {}", name, offset, what);
}

// Magic, version, sizes: told before the checksum, so that another version is not called damaged.
Result<> CheckPreamble(std::span<const std::byte> bytes, const std::string& name) {
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return UserError("{} is not an index of a layer (bad magic at offset 0)", name);
  }
  if (const auto version = Get<uint32_t>(bytes, 8); version != kFormatVersion) {
    return Failure(Error(ErrorKind::kUser, EOPNOTSUPP,
                         fmt::format("{}: format version {} is not one this unmoor ({}) reads",
                                     name, version, kFormatVersion)));
  }
  if (Get<uint64_t>(bytes, kHeaderChecksumAt) != Checksum(bytes.first(kHeaderChecksumAt))) {
    return Damaged(name, kHeaderChecksumAt, "the header does not match its checksum");
  }
  if (Get<uint32_t>(bytes, 12) != kHeaderSize) return Damaged(name, 12, "bad header size");
  if (Get<uint32_t>(bytes, 16) != kPageSize) {
    return UserError("{}: page size {} is not the {} of this machine", name,
                     Get<uint32_t>(bytes, 16), kPageSize);
  }
  if (Get<uint32_t>(bytes, 20) != kBlockSize) return Damaged(name, 20, "bad block size");
  return {};
}

Result<> CheckCounts(const Header& header, const std::string& name) {
  if (header.pages_size > kMaxLayerSize || header.pages_size % kHugePageSize != 0) {
    return Damaged(name, 40, "impossible size of the pages file");
  }
  if (header.data_bytes > header.pages_size) return Damaged(name, 48, "more data than file");
  if (header.extent_count > kMaxExtents) return Damaged(name, 56, "too many extents");
  if (header.segment_count > kMaxSegments) return Damaged(name, 64, "too many segments");
  if (header.hash_count > kMaxLayerSize / kBlockSize) return Damaged(name, 72, "too many hashes");
  return {};
}

// Checks one extent by itself and against the one before it in the file.
Result<> CheckExtent(const Extent& extent, uint64_t previous_end, uint64_t pages_size, size_t at,
                     const std::string& name) {
  const uint64_t address = extent.range.begin.value;
  const uint64_t length = extent.range.size().value;
  if (extent.task_vpid == 0) return Damaged(name, at, "an extent of no task");
  if (address % kPageSize != 0) return Damaged(name, at + 8, "unaligned address");
  if (length == 0 || length % kPageSize != 0 || address > kAddressLimit ||
      length > kAddressLimit - address) {
    return Damaged(name, at + 16, "impossible length of an extent");
  }
  const uint64_t offset = extent.offset.value;
  if (offset % kHugePageSize != address % kHugePageSize) {
    return Damaged(name, at + 24, "address and file offset differ modulo 2 MiB");
  }
  if (offset > pages_size || length > pages_size - offset ||
      pages_size - offset - length < kHugePageSize) {
    return Damaged(name, at + 24, "an extent beyond the end of the pages file");
  }
  if (previous_end != 0 && (offset < previous_end || offset - previous_end < kHugePageSize)) {
    return Damaged(name, at + 24, "extents overlap or are out of order");
  }
  return {};
}

// No two extents of one task may share an address.
class AddressSpaces {
 public:
  [[nodiscard]] bool Add(uint32_t task, VaddrRange range) {
    auto& space = spaces_[task];
    const auto next = space.lower_bound(range.begin);
    if (next != space.end() && next->first < range.end) return false;
    if (next != space.begin() && std::prev(next)->second > range.begin) return false;
    space.emplace_hint(next, range.begin, range.end);
    return true;
  }

 private:
  std::map<uint32_t, std::map<Vaddr, Vaddr>> spaces_;
};

// Appends the `count` segments of `extent`, which begin at `at` in `bytes`.
Result<> DecodeSegments(std::span<const std::byte> bytes, size_t at, uint32_t count,
                        const std::string& name, Extent& extent, std::vector<Segment>& segments) {
  const FileRange whole = extent.file_range();
  uint64_t previous_end = 0;
  for (uint32_t i = 0; i < count; ++i, at += kSegmentSize) {
    const uint64_t offset = Get<uint64_t>(bytes, at);
    const uint64_t length = Get<uint64_t>(bytes, at + 8);
    const size_t place = kHeaderSize + at;
    if (offset % kPageSize != 0 || length % kPageSize != 0 || length == 0) {
      return Damaged(name, place, "unaligned or empty segment");
    }
    if (offset < whole.begin.value || offset >= whole.end.value ||
        length > whole.end.value - offset) {
      return Damaged(name, place, "a segment outside of its extent");
    }
    if (i > 0 && offset <= previous_end) {
      return Damaged(name, place, "segments overlap or are out of order");
    }
    previous_end = offset + length;
    const Vaddr begin = extent.range.begin + (FileOffset(offset) - extent.offset);
    segments.push_back({extent.task_vpid, {begin, begin + Bytes(length)}, FileOffset(offset)});
    extent.data += Bytes(length);
  }
  return {};
}

Extent DecodeExtent(std::span<const std::byte> bytes, size_t at) {
  Extent extent;
  extent.task_vpid = Get<uint32_t>(bytes, at);
  extent.range.begin = Vaddr(Get<uint64_t>(bytes, at + 8));
  extent.range.end = extent.range.begin + Bytes(Get<uint64_t>(bytes, at + 16));
  extent.offset = FileOffset(Get<uint64_t>(bytes, at + 24));
  return extent;
}

Result<> CheckSums(const Header& header, const Tables& tables, const std::string& name) {
  if (tables.segments.size() != header.segment_count) {
    return Damaged(name, 64, "segment counts do not add up");
  }
  uint64_t data = 0;
  for (const Extent& extent : tables.extents) data += extent.data.value;
  if (data != header.data_bytes) return Damaged(name, 48, "data bytes do not add up");
  uint64_t blocks = 0;
  ForEachDataBlock(tables.segments, [&](uint64_t) { ++blocks; });
  if (blocks != header.hash_count) return Damaged(name, 72, "hashes are missing or too many");
  return {};
}

}  // namespace

void PutId(std::span<std::byte> bytes, size_t at, const std::string& id) {
  for (size_t i = 0; i < kLayerIdLength / 2; ++i) {
    bytes[at + i] = static_cast<std::byte>(HexDigit(id[2 * i]) << 4 | HexDigit(id[2 * i + 1]));
  }
}

std::string GetId(std::span<const std::byte> bytes, size_t at) {
  std::string id;
  for (size_t i = 0; i < kLayerIdLength / 2; ++i) {
    id += fmt::format("{:02x}", static_cast<unsigned>(bytes[at + i]));
  }
  return id;
}

uint64_t Checksum(std::span<const std::byte> bytes) {
  return HashOf(bytes);
}

std::vector<std::byte> EncodeHeader(Header& header) {
  std::vector<std::byte> bytes(kHeaderSize);
  std::memcpy(bytes.data(), kMagic.data(), kMagic.size());
  Put<uint32_t>(bytes, 8, kFormatVersion);
  Put<uint32_t>(bytes, 12, kHeaderSize);
  Put<uint32_t>(bytes, 16, kPageSize);
  Put<uint32_t>(bytes, 20, kBlockSize);
  PutId(bytes, 24, header.id);
  Put(bytes, 40, header.pages_size);
  Put(bytes, 48, header.data_bytes);
  Put(bytes, 56, header.extent_count);
  Put(bytes, 64, header.segment_count);
  Put(bytes, 72, header.hash_count);
  Put(bytes, 80, header.hash_checksum);
  Put(bytes, 88, header.table_checksum);
  header.header_checksum = Checksum(std::span(bytes).first(kHeaderChecksumAt));
  Put(bytes, kHeaderChecksumAt, header.header_checksum);
  return bytes;
}

std::vector<std::byte> EncodeTables(std::span<const Extent> extents,
                                    std::span<const Segment> segments) {
  std::vector<std::byte> bytes(extents.size() * kExtentSize + segments.size() * kSegmentSize);
  size_t segment_at = extents.size() * kExtentSize;
  size_t next = 0;
  for (size_t i = 0; i < extents.size(); ++i) {
    const Extent& extent = extents[i];
    const size_t first = next;
    for (; next < segments.size() && segments[next].offset < extent.file_range().end; ++next) {
      Put(bytes, segment_at, segments[next].offset.value);
      Put(bytes, segment_at + 8, segments[next].range.size().value);
      segment_at += kSegmentSize;
    }
    const size_t at = i * kExtentSize;
    Put(bytes, at, extent.task_vpid);
    Put(bytes, at + 4, static_cast<uint32_t>(next - first));
    Put(bytes, at + 8, extent.range.begin.value);
    Put(bytes, at + 16, extent.range.size().value);
    Put(bytes, at + 24, extent.offset.value);
  }
  return bytes;
}

std::vector<std::byte> EncodeHashes(std::span<const uint64_t> hashes) {
  std::vector<std::byte> bytes(hashes.size() * kHashSize);
  for (size_t i = 0; i < hashes.size(); ++i) Put(bytes, i * kHashSize, hashes[i]);
  return bytes;
}

Result<Header> DecodeHeader(std::span<const std::byte> bytes, const std::string& name) {
  UNMOOR_TRY(CheckPreamble(bytes, name));
  Header header;
  header.id = GetId(bytes, 24);
  header.pages_size = Get<uint64_t>(bytes, 40);
  header.data_bytes = Get<uint64_t>(bytes, 48);
  header.extent_count = Get<uint64_t>(bytes, 56);
  header.segment_count = Get<uint64_t>(bytes, 64);
  header.hash_count = Get<uint64_t>(bytes, 72);
  header.hash_checksum = Get<uint64_t>(bytes, 80);
  header.table_checksum = Get<uint64_t>(bytes, 88);
  header.header_checksum = Get<uint64_t>(bytes, kHeaderChecksumAt);
  for (size_t i = kReservedBegin; i < kHeaderChecksumAt; ++i) {
    if (bytes[i] != std::byte{0}) return Damaged(name, i, "a reserved byte is not zero");
  }
  UNMOOR_TRY(CheckCounts(header, name));
  return header;
}

Result<Tables> DecodeTables(const Header& header, std::span<const std::byte> bytes,
                            const std::string& name) {
  if (Checksum(bytes) != header.table_checksum) {
    return Damaged(name, kHeaderSize, "extents and segments do not match their checksum");
  }
  Tables tables;
  tables.extents.reserve(header.extent_count);
  tables.segments.reserve(header.segment_count);
  AddressSpaces spaces;
  uint64_t previous_end = 0;
  size_t segment_at = header.extent_count * kExtentSize;
  for (size_t i = 0; i < header.extent_count; ++i) {
    const size_t at = i * kExtentSize;
    Extent extent = DecodeExtent(bytes, at);
    UNMOOR_TRY(CheckExtent(extent, previous_end, header.pages_size, kHeaderSize + at, name));
    if (!spaces.Add(extent.task_vpid, extent.range)) {
      return Damaged(name, kHeaderSize + at + 8, "two extents of a task share addresses");
    }
    const auto count = Get<uint32_t>(bytes, at + 4);
    if (count > header.segment_count - tables.segments.size()) {
      return Damaged(name, kHeaderSize + at + 4, "more segments than the header says");
    }
    UNMOOR_TRY(DecodeSegments(bytes, segment_at, count, name, extent, tables.segments));
    segment_at += count * kSegmentSize;
    previous_end = extent.file_range().end.value;
    tables.extents.push_back(extent);
  }
  UNMOOR_TRY(CheckSums(header, tables, name));
  return tables;
}

std::vector<uint64_t> DecodeHashes(std::span<const std::byte> bytes) {
  std::vector<uint64_t> hashes(bytes.size() / kHashSize);
  for (size_t i = 0; i < hashes.size(); ++i) hashes[i] = Get<uint64_t>(bytes, i * kHashSize);
  return hashes;
}

}  // namespace unmoor::index_format
