// In which order an address space brings its pages.
#include "lazy/address_space.h"

#include <gtest/gtest.h>

#include "image/layout.h"

namespace unmoor {
namespace {

constexpr int kNoUffd = -1;

VaddrRange Blocks(uint64_t begin, uint64_t count) {
  return {Vaddr(begin * kBlockSize), Vaddr((begin + count) * kBlockSize)};
}

AddressSpace Space(std::vector<VaddrRange> first = {}) {
  const std::vector<OverlayRun> runs = {{Blocks(16, 4), 0, FileOffset(0)},
                                        {Blocks(32, 2), 1, FileOffset(8 * kBlockSize)}};
  return AddressSpace(kNoUffd, PagesToCome(runs), std::move(first));
}

// By layer and number.
std::vector<std::pair<uint32_t, uint64_t>> Order(const AddressSpace& space, size_t count) {
  std::vector<std::pair<uint32_t, uint64_t>> order;
  for (const BlockName& block : space.Upcoming(count)) {
    order.emplace_back(block.layer, block.begin.value / kBlockSize);
  }
  return order;
}

using Expected = std::vector<std::pair<uint32_t, uint64_t>>;

TEST(AddressSpace, BringsByAddress) {
  EXPECT_EQ(Order(Space(), 6), (Expected{{0, 0}, {0, 1}, {0, 2}, {0, 3}, {1, 8}, {1, 9}}));
}

TEST(AddressSpace, BringsTheWorkingSetFirst) {
  const AddressSpace space = Space({Blocks(33, 1), Blocks(17, 2), Blocks(50, 1)});
  EXPECT_TRUE(space.has_first());
  EXPECT_EQ(Order(space, 4), (Expected{{1, 9}, {0, 1}, {0, 2}, {0, 0}}));
}

TEST(AddressSpace, DoesNotBringWhatWasGivenBack) {
  AddressSpace space = Space({Blocks(17, 1), Blocks(18, 1)});
  space.GivenBack(Blocks(17, 1));
  EXPECT_EQ(Order(space, 4), (Expected{{0, 2}, {0, 0}, {0, 2}, {0, 3}}));
}

TEST(AddressSpace, BringsWhatMovedToWhereItIs) {
  AddressSpace space = Space();
  space.Moved(Blocks(16, 4), Blocks(64, 4).begin);
  EXPECT_EQ(Order(space, 3), (Expected{{1, 8}, {1, 9}, {0, 0}}));
}

}  // namespace
}  // namespace unmoor
