// The index of a layer: what is encoded is decoded, a damaged byte never passes, and what passes
// though somebody made its checksums right still keeps every rule. Document: docs/format.md.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "generators.h"
#include "image/index_format.h"

namespace unmoor::properties {
namespace {

using index_format::Header;
using index_format::Tables;

struct Index {
  Header header;
  std::vector<Extent> extents;
  std::vector<Segment> segments;
};

// Extents of a few tasks, `least` of each, where the allocator puts them; each with some runs of
// pages.
Index MakeIndex(int least) {
  Index index;
  LayoutAllocator layout;
  for (uint32_t task = 1, tasks = *rc::gen::inRange<uint32_t>(1, 4); task <= tasks; ++task) {
    uint64_t at = *rc::gen::inRange<uint64_t>(1, 5000);
    for (int n = *rc::gen::inRange(least, 4); n > 0; --n) {
      const auto length = *rc::gen::inRange<uint64_t>(1, 70);
      Extent extent;
      extent.task_vpid = task;
      extent.range = PagesAt(at, at + length);
      extent.offset = layout.Allocate(extent.range).value();
      for (const VaddrRange part : (*PageSets(length)).ranges.Inside(PagesAt(0, length))) {
        const Bytes shift = part.begin - Vaddr(0);
        const Vaddr begin = extent.range.begin + shift;
        index.segments.push_back({task, {begin, begin + part.size()}, extent.offset + shift});
        extent.data += part.size();
      }
      index.header.data_bytes += extent.data.value;
      index.extents.push_back(extent);
      at += length + *rc::gen::inRange<uint64_t>(0, 1000);
    }
  }
  index.header.id = *Ids();
  index.header.pages_size = layout.file_size().value;
  index.header.extent_count = index.extents.size();
  index.header.segment_count = index.segments.size();
  index_format::ForEachDataBlock(index.segments, [&](uint64_t) { ++index.header.hash_count; });
  return index;
}

RC_GTEST_PROP(IndexProperties, WhatIsEncodedIsDecoded, ()) {
  Index index = MakeIndex(0);
  const auto tables = index_format::EncodeTables(index.extents, index.segments);
  index.header.table_checksum = index_format::Checksum(tables);
  index.header.hash_checksum = *rc::gen::arbitrary<uint64_t>();
  const auto header_bytes = index_format::EncodeHeader(index.header);
  RC_ASSERT(header_bytes.size() == index_format::kHeaderSize);
  const auto header = index_format::DecodeHeader(header_bytes, "index");
  RC_ASSERT(header.has_value());
  RC_ASSERT(header->id == index.header.id);
  RC_ASSERT(header->pages_size == index.header.pages_size);
  RC_ASSERT(header->data_bytes == index.header.data_bytes);
  RC_ASSERT(header->hash_count == index.header.hash_count);
  RC_ASSERT(header->hash_checksum == index.header.hash_checksum);
  RC_ASSERT(header->header_checksum == index.header.header_checksum);
  RC_ASSERT(header->table_bytes() == tables.size());
  const auto decoded = index_format::DecodeTables(*header, tables, "index");
  RC_ASSERT(decoded.has_value());
  RC_ASSERT(decoded->extents == index.extents);
  RC_ASSERT(decoded->segments == index.segments);
}

RC_GTEST_PROP(IndexProperties, HashesAreReadAsWritten, (const std::vector<uint64_t>& hashes)) {
  RC_ASSERT(index_format::DecodeHashes(index_format::EncodeHashes(hashes)) == hashes);
}

RC_GTEST_PROP(IndexProperties, OneChangedByteOfTheHeaderIsFound, ()) {
  Index index = MakeIndex(0);
  auto bytes = index_format::EncodeHeader(index.header);
  bytes[*rc::gen::inRange<size_t>(0, bytes.size())] ^=
      static_cast<std::byte>(*rc::gen::inRange(1, 256));
  RC_ASSERT(!index_format::DecodeHeader(bytes, "index"));
}

RC_GTEST_PROP(IndexProperties, OneChangedByteOfTheTablesIsFound, ()) {
  Index index = MakeIndex(1);
  auto tables = index_format::EncodeTables(index.extents, index.segments);
  index.header.table_checksum = index_format::Checksum(tables);
  tables[*rc::gen::inRange<size_t>(0, tables.size())] ^=
      static_cast<std::byte>(*rc::gen::inRange(1, 256));
  RC_ASSERT(!index_format::DecodeTables(index.header, tables, "index"));
}

// The rules of the format, stated once more and independently of the decoder.
bool KeepsTheRules(const Header& header, const Tables& tables) {
  uint64_t data = 0;
  uint64_t previous_end = 0;
  size_t segment = 0;
  for (size_t i = 0; i < tables.extents.size(); ++i) {
    const Extent& extent = tables.extents[i];
    const FileRange file = extent.file_range();
    if (extent.task_vpid == 0 || extent.range.empty()) return false;
    if (extent.range.begin.value % kPageSize != 0 || extent.range.end.value % kPageSize != 0) {
      return false;
    }
    if (file.begin.value % kHugePageSize != extent.range.begin.value % kHugePageSize) return false;
    if (i > 0 && file.begin.value < previous_end + kHugePageSize) return false;
    if (file.end.value + kHugePageSize > header.pages_size) return false;
    previous_end = file.end.value;
    for (size_t j = 0; j < i; ++j) {
      const Extent& other = tables.extents[j];
      if (other.task_vpid == extent.task_vpid && other.range.Overlaps(extent.range)) return false;
    }
    uint64_t last = 0;
    for (; segment < tables.segments.size(); ++segment) {
      const Segment& s = tables.segments[segment];
      if (!file.Contains(s.file_range())) break;
      if (s.range.empty() || s.offset.value % kPageSize != 0) return false;
      if (s.range.begin - extent.range.begin != s.offset - extent.offset) return false;
      if (last != 0 && s.offset.value <= last) return false;
      last = s.file_range().end.value;
      data += s.range.size().value;
    }
  }
  return segment == tables.segments.size() && data == header.data_bytes;
}

RC_GTEST_PROP(IndexProperties, ForgedTablesAreRefusedOrKeepTheRules, ()) {
  Index index = MakeIndex(1);
  auto tables = index_format::EncodeTables(index.extents, index.segments);
  for (int n = *rc::gen::inRange(1, 4); n > 0; --n) {
    const auto at = *rc::gen::inRange<size_t>(0, tables.size() / 8) * 8;
    // Whole fields, to values that mean something, more often than bits.
    const auto value = *rc::gen::oneOf(
        rc::gen::map(rc::gen::inRange<uint64_t>(0, 6000), [](uint64_t n) { return n * kPageSize; }),
        rc::gen::element<uint64_t>(0, 1, ~uint64_t{0}, kAddressLimit, kMaxLayerSize,
                                   ~uint64_t{0} - kPageSize + 1),
        rc::gen::arbitrary<uint64_t>());
    for (size_t i = 0; i < 8; ++i) {
      tables[at + i] = static_cast<std::byte>((value >> (8 * i)) & 0xff);
    }
  }
  index.header.table_checksum = index_format::Checksum(tables);
  const auto decoded = index_format::DecodeTables(index.header, tables, "index");
  RC_CLASSIFY(decoded.has_value(), "accepted");
  if (decoded) RC_ASSERT(KeepsTheRules(index.header, *decoded));
}

}  // namespace
}  // namespace unmoor::properties
