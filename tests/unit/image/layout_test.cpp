// The layout of a .pages file: congruence, gaps, limits.
#include "image/layout.h"

#include "image_fixture.h"

namespace unmoor {
namespace {

TEST(Layout, OffsetIsCongruentToAddressAndExtentsNeverTouch) {
  LayoutAllocator layout;
  uint64_t end = 0;
  for (uint64_t i = 0; i < 2000; ++i) {
    const VaddrRange range = Pages(0x7f0000000000 + i * 0x12345000, 1 + i % 700);
    const auto offset = layout.Allocate(range);
    ASSERT_OK(offset);
    EXPECT_EQ(offset->value % kHugePageSize, range.begin.value % kHugePageSize);
    if (i > 0) {
      EXPECT_GE(offset->value, end + kHugePageSize);
    }
    end = offset->value + range.size().value;
    EXPECT_GE(layout.file_size().value, end + kHugePageSize);
    EXPECT_EQ(layout.file_size().value % kHugePageSize, 0u);
  }
  EXPECT_LE(layout.file_size().value, kMaxLayerSize);
}

TEST(Layout, FirstGapIsTheLargestAllowed) {
  LayoutAllocator layout;
  const VaddrRange range = Pages(0x10000000, 512);
  ASSERT_OK(layout.Allocate(range));
  EXPECT_EQ(layout.file_size().value, kHugePageSize + kMaxGrowthGap);
}

TEST(Layout, ManyVmasStillFit) {
  LayoutAllocator layout;
  for (uint64_t i = 0; i < 65530; ++i) {
    ASSERT_OK(layout.Allocate(Pages(0x7f0000000000 + i * 0x3000, 1)));
  }
}

TEST(Layout, WhatDoesNotFitIsRefused) {
  LayoutAllocator layout;
  EXPECT_FALSE(layout.Allocate({Vaddr(0x1000), Vaddr(kMaxLayerSize + 0x2000)}));
  EXPECT_FALSE(layout.Allocate({Vaddr(0x1000), Vaddr(kMaxLayerSize)}));
  EXPECT_FALSE(layout.Allocate({Vaddr(0x1000), Vaddr(0x1000)}));
  EXPECT_FALSE(layout.Allocate({Vaddr(0x1001), Vaddr(0x3000)}));
  EXPECT_FALSE(layout.Allocate({Vaddr(0xffffffffff600000), Vaddr(0xffffffffff601000)}));
  EXPECT_EQ(layout.file_size().value, 0u);
}

TEST(Layout, IdsAreValidAndDiffer) {
  const auto a = NewId();
  const auto b = NewId();
  ASSERT_OK(a);
  ASSERT_OK(b);
  EXPECT_TRUE(IsValidId(*a));
  EXPECT_NE(*a, *b);
  EXPECT_FALSE(IsValidId("../../etc/passwd"));
  EXPECT_FALSE(IsValidId("0123456789ABCDEF0123456789abcdef"));
}

}  // namespace
}  // namespace unmoor
