// See packed_format.h. Offsets of fields are those of docs/format.md.
#include "image/packed_format.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "base/little_endian.h"
#include "image/index_format.h"
#include "image/layout.h"

namespace unmoor::packed_format {
namespace {

constexpr std::array<uint8_t, 8> kMagic = {'u', 'n', 'm', 'o', 'o', 'r', 'P', 'K'};
constexpr std::array<uint8_t, 8> kEndMagic = {'u', 'n', 'm', 'o', 'o', 'r', 'P', 'E'};
constexpr size_t kReservedBegin = 72;
constexpr size_t kChecksumAt = 120;
constexpr size_t kTrailerChecksumAt = 24;

Failure Damaged(const std::string& name, uint64_t offset, std::string_view what) {
  return UserError("{} is damaged at offset {}: {}", name, offset, what);
}

// The reserved bytes and all that binds the file to its index.
Result<> CheckBinding(std::span<const std::byte> bytes, const LayerIndex& index, size_t frames,
                      const std::string& name) {
  const index_format::Header& of_index = index.header;
  if (index_format::GetId(bytes, 24) != of_index.id ||
      GetLittleEndian<uint64_t>(bytes, 40) != of_index.header_checksum ||
      GetLittleEndian<uint64_t>(bytes, 48) != of_index.pages_size ||
      GetLittleEndian<uint64_t>(bytes, 56) != of_index.data_bytes) {
    return UserError(
        "{} does not belong to the index beside it; a file of another checkpoint was "
        "put here",
        name);
  }
  if (GetLittleEndian<uint64_t>(bytes, 64) != frames) {
    return Damaged(name, 64, "frames are missing or too many");
  }
  for (size_t i = kReservedBegin; i < kChecksumAt; ++i) {
    if (bytes[i] != std::byte{0}) return Damaged(name, i, "a reserved byte is not zero");
  }
  return {};
}

}  // namespace

FramePlan PlanFrames(const LayerIndex& index) {
  FramePlan plan;
  size_t block = 0;
  for (const Segment& segment : index.tables.segments) {
    FileRange left = segment.file_range();
    while (!left.empty()) {
      const uint64_t piece = left.begin.value / kPieceSize;
      const FileOffset end(std::min(left.end.value, (piece + 1) * kPieceSize));
      if (plan.frames.empty() || plan.frames.back().piece != piece) {
        plan.frames.push_back({piece, 0, 0, plan.runs.size(), block, 0});
      }
      Frame& frame = plan.frames.back();
      const FileRange run{left.begin, end};
      frame.content += static_cast<uint32_t>(run.size().value);
      ++frame.run_count;
      plan.runs.push_back(run);
      while (block < index.blocks.size() && index.blocks[block] * kBlockSize < end.value) ++block;
      frame.block_count = block - frame.first_block;
      left.begin = end;
    }
  }
  return plan;
}

void SpreadFrame(const FramePlan& plan, const Frame& frame, std::span<const std::byte> content,
                 std::span<std::byte> into) {
  uint64_t at = 0;  // in `into`
  for (size_t i = frame.first_run; i < frame.first_run + frame.run_count; ++i) {
    const FileRange& run = plan.runs[i];
    const uint64_t place = run.begin.value % kPieceSize;
    const size_t size = run.size().value;
    std::ranges::fill(into.subspan(at, place - at), std::byte{0});
    std::memcpy(into.subspan(place, size).data(), content.data(), size);
    content = content.subspan(size);
    at = place + size;
  }
  std::ranges::fill(into.subspan(at), std::byte{0});
}

std::vector<std::byte> EncodeHeader(const Header& header, const LayerIndex& index, size_t frames) {
  std::vector<std::byte> bytes(kHeaderSize);
  std::memcpy(bytes.data(), kMagic.data(), kMagic.size());
  PutLittleEndian<uint32_t>(bytes, 8, kFormatVersion);
  PutLittleEndian<uint32_t>(bytes, 12, kHeaderSize);
  PutLittleEndian<uint32_t>(bytes, 16, header.codec);
  PutLittleEndian<uint32_t>(bytes, 20, static_cast<uint32_t>(header.level));
  index_format::PutId(bytes, 24, index.header.id);
  PutLittleEndian(bytes, 40, index.header.header_checksum);
  PutLittleEndian(bytes, 48, index.header.pages_size);
  PutLittleEndian(bytes, 56, index.header.data_bytes);
  PutLittleEndian<uint64_t>(bytes, 64, frames);
  PutLittleEndian(bytes, kChecksumAt, index_format::Checksum(std::span(bytes).first(kChecksumAt)));
  return bytes;
}

std::vector<std::byte> EncodeHeads(std::span<const FrameHead> heads) {
  std::vector<std::byte> bytes(heads.size() * kHeadSize);
  for (size_t i = 0; i < heads.size(); ++i) {
    const size_t at = i * kHeadSize;
    PutLittleEndian(bytes, at, heads[i].piece);
    PutLittleEndian(bytes, at + 8, heads[i].content);
    PutLittleEndian(bytes, at + 12, heads[i].stored);
    PutLittleEndian(bytes, at + 16, heads[i].checksum);
    PutLittleEndian(bytes, at + 24, heads[i].place);
  }
  return bytes;
}

std::vector<std::byte> EncodeTrailer(std::span<const std::byte> table, uint64_t place) {
  std::vector<std::byte> bytes(kTrailerSize);
  PutLittleEndian(bytes, 0, place);
  PutLittleEndian(bytes, 8, index_format::Checksum(table));
  std::memcpy(&bytes[16], kEndMagic.data(), kEndMagic.size());
  PutLittleEndian(bytes, kTrailerChecksumAt,
                  index_format::Checksum(std::span(bytes).first(kTrailerChecksumAt)));
  return bytes;
}

Result<Header> DecodeHeader(std::span<const std::byte> bytes, const LayerIndex& index,
                            size_t frames, const std::string& name) {
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return UserError("{} is not a packed layer (bad magic at offset 0)", name);
  }
  if (const auto version = GetLittleEndian<uint32_t>(bytes, 8); version != kFormatVersion) {
    return Failure(Error(ErrorKind::kUser, EOPNOTSUPP,
                         fmt::format("{}: format version {} is not one this unmoor ({}) reads",
                                     name, version, kFormatVersion)));
  }
  if (GetLittleEndian<uint64_t>(bytes, kChecksumAt) !=
      index_format::Checksum(bytes.first(kChecksumAt))) {
    return Damaged(name, kChecksumAt, "the header does not match its checksum");
  }
  if (GetLittleEndian<uint32_t>(bytes, 12) != kHeaderSize) {
    return Damaged(name, 12, "bad header size");
  }
  UNMOOR_TRY(CheckBinding(bytes, index, frames, name));
  return Header{GetLittleEndian<uint32_t>(bytes, 16),
                static_cast<int32_t>(GetLittleEndian<uint32_t>(bytes, 20))};
}

Result<uint64_t> DecodeTrailer(std::span<const std::byte> trailer, uint64_t file_size,
                               size_t frames, const std::string& name) {
  const uint64_t at = file_size - kTrailerSize;
  if (std::memcmp(&trailer[16], kEndMagic.data(), kEndMagic.size()) != 0 ||
      GetLittleEndian<uint64_t>(trailer, kTrailerChecksumAt) !=
          index_format::Checksum(trailer.first(kTrailerChecksumAt))) {
    return Damaged(name, at, "no sound trailer; it is truncated or its end was changed");
  }
  const auto place = GetLittleEndian<uint64_t>(trailer, 0);
  if (place < kHeaderSize || place > at || at - place != frames * kHeadSize) {
    return Damaged(name, at, "the table of frames is not where the trailer says");
  }
  return place;
}

Result<std::vector<FrameHead>> DecodeTable(std::span<const std::byte> table,
                                           std::span<const std::byte> trailer,
                                           const FramePlan& plan, const std::string& name) {
  const auto place = GetLittleEndian<uint64_t>(trailer, 0);
  if (index_format::Checksum(table) != GetLittleEndian<uint64_t>(trailer, 8)) {
    return Damaged(name, place, "the table of frames does not match its checksum");
  }
  std::vector<FrameHead> heads(plan.frames.size());
  uint64_t next = kHeaderSize;
  for (size_t i = 0; i < heads.size(); ++i) {
    const size_t at = i * kHeadSize;
    FrameHead& head = heads[i];
    head.piece = GetLittleEndian<uint64_t>(table, at);
    head.content = GetLittleEndian<uint32_t>(table, at + 8);
    head.stored = GetLittleEndian<uint32_t>(table, at + 12);
    head.checksum = GetLittleEndian<uint64_t>(table, at + 16);
    head.place = GetLittleEndian<uint64_t>(table, at + 24);
    if (head.piece != plan.frames[i].piece || head.content != plan.frames[i].content) {
      return Damaged(name, place + at, "a frame is not the one the index asks for");
    }
    if (head.stored == 0 || head.stored > head.content || head.place != next) {
      return Damaged(name, place + at, "impossible size or place of a frame");
    }
    next += kHeadSize + head.stored;
  }
  if (next != place) return Damaged(name, place, "the frames do not end where the table begins");
  return heads;
}

}  // namespace unmoor::packed_format
