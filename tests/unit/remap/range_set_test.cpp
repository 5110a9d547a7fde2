// RangeSet against the plainest thing that could be right: one bit a page.
#include "remap/range_set.h"

#include <gtest/gtest.h>

#include <bitset>
#include <random>

namespace unmoor {
namespace {

constexpr uint64_t kPages = 96;
using Bitmap = std::bitset<kPages>;

VaddrRange Pages(uint64_t begin, uint64_t end) {
  return {Vaddr(begin * kPageSize), Vaddr(end * kPageSize)};
}

// The runs of `value` in [begin, end).
std::vector<VaddrRange> Runs(const Bitmap& bits, bool value, uint64_t begin, uint64_t end) {
  std::vector<VaddrRange> runs;
  for (uint64_t i = begin; i < end; ++i) {
    if (bits[i] != value) continue;
    if (!runs.empty() && runs.back().end == Vaddr(i * kPageSize)) {
      runs.back().end = Vaddr((i + 1) * kPageSize);
    } else {
      runs.push_back(Pages(i, i + 1));
    }
  }
  return runs;
}

TEST(RangeSet, AgreesWithABitmapInRandomHistories) {
  for (uint32_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    RangeSet set;
    Bitmap bits;
    for (int step = 0; step < 100; ++step) {
      const uint64_t begin = random() % kPages;
      const uint64_t end = begin + random() % (std::min<uint64_t>(kPages - begin, 12) + 1);
      const bool insert = random() % 2 == 0;
      insert ? set.Insert(Pages(begin, end)) : set.Erase(Pages(begin, end));
      for (uint64_t i = begin; i < end; ++i) bits[i] = insert;
      const uint64_t from = random() % kPages;
      const uint64_t to = from + random() % (kPages - from + 1);
      const auto inside = Runs(bits, true, from, to);
      ASSERT_EQ(set.Inside(Pages(from, to)), inside) << "step " << step;
      ASSERT_EQ(set.Outside(Pages(from, to)), Runs(bits, false, from, to)) << "step " << step;
      Bytes size;
      for (const VaddrRange range : inside) size += range.size();
      ASSERT_EQ(set.SizeWithin(Pages(from, to)), size);
      ASSERT_EQ(set.empty(), bits.none());
    }
  }
}

TEST(RangeSet, TouchingRangesBecomeOne) {
  RangeSet set;
  set.Insert(Pages(0, 1));
  set.Insert(Pages(2, 3));
  set.Insert(Pages(1, 2));
  EXPECT_EQ(set.Inside(Pages(0, 9)), std::vector{Pages(0, 3)});
}

TEST(RangeSet, EmptyRangesChangeNothing) {
  RangeSet set;
  set.Insert(Pages(4, 4));
  EXPECT_TRUE(set.empty());
  set.Insert(Pages(3, 6));
  set.Erase(Pages(5, 5));
  EXPECT_EQ(set.SizeWithin(Pages(0, 9)), Bytes(3 * kPageSize));
  EXPECT_TRUE(set.Inside(Pages(4, 4)).empty());
  EXPECT_TRUE(set.Outside(Pages(4, 4)).empty());
}

}  // namespace
}  // namespace unmoor
