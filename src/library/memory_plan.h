// MemoryPlan: which ranges an image gets, and which of their pages have to be looked at.
//
// PlanMemory cuts the caller's ranges where the protection changes; RelateToBase cuts them again
// where the base image begins and ends, and leaves out the pages that are certain to be as in the
// base. Both read /proc/self of the moment; nothing is written here.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "library/page_image_impl.h"
#include "unmoor/memory_range.h"
#include "unmoor/page_image.h"

namespace unmoor {
inline namespace v1 {

struct PlannedRange {
  VaddrRange range;
  int prot = 0;
  PageSource source;       // empty: memory of this process
  bool anonymous = false;  // its pages that are nobody's own are zeros
  uint64_t device = 0;     // of the mapped file otherwise
  uint64_t inode = 0;
  FileOffset offset;                // of range.begin in that file
  std::vector<VaddrRange> look_at;  // pages that may hold data, or differ from the base
  int base_vma = -1;                // index into the base's vmas(), which contains `range`
};

// Errors (kUser): unaligned, empty, overlapping or unmapped ranges, shared mappings, memory that
// holds data and cannot be read. Ascending.
[[nodiscard]] Result<std::vector<PlannedRange>> PlanMemory(std::span<const MemoryRange> memory);

// Sorts; an error (kUser) when two overlap.
[[nodiscard]] Result<> SortRanges(std::vector<PlannedRange>& ranges);

// `tracked`: ranges in which exactly the pages of `changed` may differ from the base. Both
// ascending and apart.
[[nodiscard]] Result<std::vector<PlannedRange>> RelateToBase(std::vector<PlannedRange> ranges,
                                                             const PageImage::Impl& base,
                                                             std::span<const VaddrRange> tracked,
                                                             std::span<const VaddrRange> changed);

}  // namespace v1
}  // namespace unmoor
