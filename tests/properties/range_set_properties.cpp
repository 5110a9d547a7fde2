// Range arithmetic against one bit a page, and the laws of Range itself.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "generators.h"

namespace unmoor::properties {
namespace {

constexpr uint64_t kLimit = 64;

struct Step {
  bool insert = true;
  VaddrRange range;
};
[[maybe_unused]] void showValue(const Step& step, std::ostream& out) {
  out << (step.insert ? "insert " : "erase ");
  rc::showValue(step.range, out);
}

rc::Gen<Step> Steps() {
  return rc::gen::build<Step>(rc::gen::set(&Step::insert, rc::gen::arbitrary<bool>()),
                              rc::gen::set(&Step::range, PageRanges(kLimit)));
}

RC_GTEST_PROP(RangeSetProperties, AgreesWithOneBitAPageAfterAnyHistory, ()) {
  RangeSet set;
  std::set<uint64_t> bits;
  for (const Step& step : *rc::gen::container<std::vector<Step>>(Steps())) {
    const std::set<uint64_t> pages = PagesOf({step.range});
    if (step.insert) {
      set.Insert(step.range);
      bits.insert(pages.begin(), pages.end());
    } else {
      set.Erase(step.range);
      for (const uint64_t page : pages) bits.erase(page);
    }
  }
  const VaddrRange window = *PageRanges(kLimit);
  const auto inside = set.Inside(window);
  const auto outside = set.Outside(window);
  std::set<uint64_t> expected_inside;
  std::set<uint64_t> expected_outside;
  for (const uint64_t page : PagesOf({window})) {
    (bits.contains(page) ? expected_inside : expected_outside).insert(page);
  }
  RC_ASSERT(PagesOf(inside) == expected_inside);
  RC_ASSERT(PagesOf(outside) == expected_outside);
  RC_ASSERT(InOrder(inside) && InOrder(outside));
  RC_ASSERT(set.SizeWithin(window).value == expected_inside.size() * kPageSize);
  RC_ASSERT(set.empty() == bits.empty());
}

RC_GTEST_PROP(RangeSetProperties, NoTwoRangesOfASetTouch, ()) {
  const PageSet set = *PageSets(kLimit);
  const auto all = set.ranges.Inside(PagesAt(0, kLimit));
  for (size_t i = 1; i < all.size(); ++i) RC_ASSERT(all[i - 1].end < all[i].begin);
}

RC_GTEST_PROP(RangeSetProperties, OrderOfInsertionDoesNotMatter, ()) {
  const auto ranges = *rc::gen::container<std::vector<VaddrRange>>(PageRanges(kLimit));
  RangeSet forwards;
  RangeSet backwards;
  for (size_t i = 0; i < ranges.size(); ++i) {
    forwards.Insert(ranges[i]);
    backwards.Insert(ranges[ranges.size() - 1 - i]);
  }
  RC_ASSERT(forwards.Inside(PagesAt(0, kLimit)) == backwards.Inside(PagesAt(0, kLimit)));
}

RC_GTEST_PROP(RangeProperties, IntersectContainsAndOverlapsAgree, ()) {
  const VaddrRange a = *PageRanges(kLimit);
  const VaddrRange b = *PageRanges(kLimit);
  const VaddrRange both = a.Intersect(b);
  std::set<uint64_t> expected;
  for (const uint64_t page : PagesOf({a})) {
    if (b.Contains(Vaddr(page * kPageSize))) expected.insert(page);
  }
  RC_ASSERT(PagesOf({both}) == expected);
  RC_ASSERT(PagesOf({b.Intersect(a)}) == expected);
  if (!a.empty() && !b.empty()) RC_ASSERT(a.Overlaps(b) == !expected.empty());
  if (!both.empty()) RC_ASSERT(a.Contains(both) && b.Contains(both));
}

RC_GTEST_PROP(AlignProperties, AlignDownAndAlignUpEncloseTheValueTightly, ()) {
  const auto value = *rc::gen::inRange<uint64_t>(0, uint64_t{1} << 56);
  const uint64_t alignment = uint64_t{1} << *rc::gen::inRange(0, 31);
  const uint64_t down = AlignDown(value, alignment);
  const uint64_t up = AlignUp(value, alignment);
  RC_ASSERT(down <= value && value <= up);
  RC_ASSERT(down % alignment == 0U && up % alignment == 0U);
  RC_ASSERT(value - down < alignment && up - value < alignment);
}

}  // namespace
}  // namespace unmoor::properties
