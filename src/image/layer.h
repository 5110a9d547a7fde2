// What a layer consists of, as writer, reader and manifest speak of it: extents and segments.
//
// An extent is the place of one VMA in the .pages file; a segment is a run of pages inside an
// extent that hold data. Everything else in the file is a hole and reads zero. Plain values.
// Document: docs/format.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/units.h"

namespace unmoor {

struct Extent {
  uint32_t task_vpid = 0;
  VaddrRange range;
  FileOffset offset;  // congruent to range.begin modulo 2 MiB
  Bytes data;         // sum of its segments

  [[nodiscard]] FileRange file_range() const { return {offset, offset + range.size()}; }
  bool operator==(const Extent&) const = default;
};

struct Segment {
  uint32_t task_vpid = 0;
  VaddrRange range;
  FileOffset offset;

  [[nodiscard]] FileRange file_range() const { return {offset, offset + range.size()}; }
  bool operator==(const Segment&) const = default;
};

struct LayerInfo {
  std::string id;
  Bytes file_size;   // sparse: says nothing about disk use
  Bytes data_bytes;  // bytes in segments
  Bytes allocated;   // on disk, pages file and index (st_blocks); 0 may mean "not written back yet"
  std::vector<Extent> extents;    // in file order
  std::vector<Segment> segments;  // in file order
  uint64_t index_checksum = 0;    // header checksum of the index, which covers all of it
};

}  // namespace unmoor
