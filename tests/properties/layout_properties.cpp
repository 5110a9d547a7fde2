// Where extents go: congruent to their addresses, apart, each with its gap, in a file of bounded
// size, for any sequence of ranges. Document: docs/format.md, "Layer: .pages".
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "generators.h"
#include "image/layout.h"

namespace unmoor::properties {
namespace {

constexpr uint64_t kMaxPages = kAddressLimit / kPageSize;

// From one page to terabytes, anywhere in the address space.
rc::Gen<VaddrRange> VmaRanges() {
  const auto size = rc::gen::mapcat(rc::gen::inRange(0, 31), [](int bits) {
    return rc::gen::inRange<uint64_t>(uint64_t{1} << bits, (uint64_t{2} << bits) + 1);
  });
  const auto begin = rc::gen::inRange<uint64_t>(0, kMaxPages - (uint64_t{4} << 31));
  return rc::gen::map(rc::gen::pair(begin, size), [](const auto& pair) {
    return PagesAt(pair.first, pair.first + pair.second);
  });
}

// As the document has it.
uint64_t DocumentedGap(uint64_t end) {
  const uint64_t two_mib = 2 << 20;
  const uint64_t eight_tib = uint64_t{8} << 40;
  const uint64_t sixteen_gib = uint64_t{16} << 30;
  uint64_t gap = end < eight_tib ? (eight_tib - end) / 256 : two_mib;
  if (gap < two_mib) gap = two_mib;
  if (gap > sixteen_gib) gap = sixteen_gib;
  return gap / two_mib * two_mib;
}

RC_GTEST_PROP(LayoutProperties, ExtentsAreCongruentApartAndFollowedByTheirGap, ()) {
  LayoutAllocator layout;
  uint64_t used = 0;  // the end of the last gap
  for (const VaddrRange range : *rc::gen::container<std::vector<VaddrRange>>(VmaRanges())) {
    const auto offset = layout.Allocate(range);
    if (!offset) {
      // Refused for lack of room only, and without effect.
      const uint64_t worst = used + 2 * kHugePageSize + range.size().value;
      RC_ASSERT(worst + DocumentedGap(worst) + kHugePageSize > kMaxLayerSize);
      RC_ASSERT(layout.file_size().value == used);
      continue;
    }
    const uint64_t begin = offset->value;
    const uint64_t end = begin + range.size().value;
    RC_ASSERT(begin % kHugePageSize == range.begin.value % kHugePageSize);
    RC_ASSERT(begin >= used && begin - used < kHugePageSize);
    const uint64_t next = layout.file_size().value;
    RC_ASSERT(next % kHugePageSize == 0U);
    RC_ASSERT(next - end >= DocumentedGap(end));
    RC_ASSERT(next - end < DocumentedGap(end) + kHugePageSize);
    RC_ASSERT(next <= kMaxLayerSize);
    used = next;
  }
}

RC_GTEST_PROP(LayoutProperties, WhatIsNoRangeOfPagesGetsNoPlace, ()) {
  VaddrRange range = *VmaRanges();
  switch (*rc::gen::inRange(0, 4)) {
    case 0:
      range.begin = range.begin + Bytes(*rc::gen::inRange<uint64_t>(1, kPageSize));
      break;
    case 1:
      range.end = range.end - Bytes(*rc::gen::inRange<uint64_t>(1, kPageSize));
      break;
    case 2:
      range.end = range.begin;
      break;
    default:
      range = {Vaddr(kAddressLimit - kPageSize), Vaddr(kAddressLimit + kPageSize)};
  }
  LayoutAllocator layout;
  RC_ASSERT(!layout.Allocate(range));
  RC_ASSERT(layout.file_size() == Bytes(0));
}

RC_GTEST_PROP(LayoutProperties, IdsAreThirtyTwoLowerCaseDigitsAndNothingElse, ()) {
  std::string id = *Ids();
  RC_ASSERT(IsValidId(id));
  const auto at = *rc::gen::inRange<size_t>(0, id.size());
  id[at] = *rc::gen::element('g', 'A', 'F', ' ', '\0', '/', '-');
  RC_ASSERT(!IsValidId(id));
  RC_ASSERT(!IsValidId(*Ids() + "0"));
  RC_ASSERT(IsValidId(NewId().value()));
}

}  // namespace
}  // namespace unmoor::properties
