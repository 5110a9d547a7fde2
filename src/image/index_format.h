// The .index file as bytes: encoding and checked decoding of its header and tables.
//
// Pure functions over memory; a decoded value has passed every check of docs/format.md that needs
// nothing but the index itself. Errors name the file and the offset in it. Internal to src/image.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer.h"
#include "image/layout.h"

namespace unmoor::index_format {

inline constexpr size_t kHeaderSize = 128;
inline constexpr size_t kExtentSize = 32;
inline constexpr size_t kSegmentSize = 16;
inline constexpr size_t kHashSize = 8;

struct Header {
  std::string id;
  uint64_t pages_size = 0;
  uint64_t data_bytes = 0;
  uint64_t extent_count = 0;
  uint64_t segment_count = 0;
  uint64_t hash_count = 0;
  uint64_t hash_checksum = 0;
  uint64_t table_checksum = 0;
  uint64_t header_checksum = 0;  // filled by EncodeHeader and DecodeHeader

  // Counts are capped before these are used, so nothing overflows.
  [[nodiscard]] uint64_t table_bytes() const {
    return extent_count * kExtentSize + segment_count * kSegmentSize;
  }
  [[nodiscard]] uint64_t hash_offset() const { return kHeaderSize + table_bytes(); }
  [[nodiscard]] uint64_t file_bytes() const { return hash_offset() + hash_count * kHashSize; }
};

struct Tables {
  std::vector<Extent> extents;
  std::vector<Segment> segments;
};

// A layer id as its 16 bytes.
void PutId(std::span<std::byte> bytes, size_t at, const std::string& id);
[[nodiscard]] std::string GetId(std::span<const std::byte> bytes, size_t at);

[[nodiscard]] uint64_t Checksum(std::span<const std::byte> bytes);

// Sets header.header_checksum.
[[nodiscard]] std::vector<std::byte> EncodeHeader(Header& header);
[[nodiscard]] std::vector<std::byte> EncodeTables(std::span<const Extent> extents,
                                                  std::span<const Segment> segments);
[[nodiscard]] std::vector<std::byte> EncodeHashes(std::span<const uint64_t> hashes);

// `bytes` is kHeaderSize long.
[[nodiscard]] Result<Header> DecodeHeader(std::span<const std::byte> bytes,
                                          const std::string& name);
// `bytes` is header.table_bytes() long.
[[nodiscard]] Result<Tables> DecodeTables(const Header& header, std::span<const std::byte> bytes,
                                          const std::string& name);
// `bytes` is header.hash_count * kHashSize long; the caller has checked the checksum.
[[nodiscard]] std::vector<uint64_t> DecodeHashes(std::span<const std::byte> bytes);

// Calls block(number) for each 64 KiB block that the segments touch, ascending.
template <class Callback>
void ForEachDataBlock(std::span<const Segment> segments, Callback block) {
  uint64_t next = 0;
  for (const Segment& segment : segments) {
    const FileRange range = segment.file_range();
    const uint64_t first = std::max(next, range.begin.value / kBlockSize);
    next = std::max(next, (range.end.value + kBlockSize - 1) / kBlockSize);
    for (uint64_t i = first; i < next; ++i) block(i);
  }
}

}  // namespace unmoor::index_format
