// The remap plan: which VMAs make one area, what a block is copied from, how large a batch is.
#include "remap/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

namespace unmoor {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

constexpr int kReadWrite = PROT_READ | PROT_WRITE;
constexpr uint64_t kInode = 42;

VaddrRange Pages(uint64_t begin, uint64_t end) {
  return {Vaddr(begin * kPageSize), Vaddr(end * kPageSize)};
}

VmaInfo Image(uint64_t begin, uint64_t end, uint64_t file_page, int prot = kReadWrite) {
  VmaInfo vma;
  vma.range = Pages(begin, end);
  vma.prot = prot;
  vma.offset = FileOffset(file_page * kPageSize);
  vma.inode = kInode;
  vma.dev_major = 8;
  vma.name = "/d/layers/a.pages";
  return vma;
}

VmaInfo Anonymous(uint64_t begin, uint64_t end, int prot = kReadWrite) {
  VmaInfo vma;
  vma.range = Pages(begin, end);
  vma.prot = prot;
  return vma;
}

RangeSet SetOf(std::initializer_list<VaddrRange> ranges) {
  RangeSet set;
  for (const VaddrRange range : ranges) set.Insert(range);
  return set;
}

std::vector<Area> Find(const std::vector<VmaInfo>& vmas, const RangeSet& dropped = {}) {
  return FindAreas(vmas, [](const VmaInfo& vma) { return vma.inode != 0; }, dropped);
}

std::vector<VaddrRange> RangesOf(const std::vector<Area>& areas) {
  std::vector<VaddrRange> ranges;
  for (const Area& area : areas) ranges.push_back(area.range);
  return ranges;
}

TEST(FindAreas, NeighboursWithOneOffsetAreOneArea) {
  const auto areas = Find({Image(100, 110, 4), Image(110, 112, 14)});
  ASSERT_THAT(RangesOf(areas), ElementsAre(Pages(100, 112)));
  EXPECT_EQ(areas[0].OffsetOf(Pages(111, 112).begin), FileOffset(15 * kPageSize));
  EXPECT_EQ(areas[0].file_vma, Pages(100, 110));
}

TEST(FindAreas, AnotherOffsetFileOrProtectionOrAGapIsAnotherArea) {
  EXPECT_EQ(Find({Image(100, 110, 4), Image(110, 112, 15)}).size(), 2U);
  EXPECT_EQ(Find({Image(100, 110, 4), Image(110, 112, 14, PROT_READ)}).size(), 2U);
  EXPECT_EQ(Find({Image(100, 110, 4), Image(111, 112, 15)}).size(), 2U);
  auto other = Image(110, 112, 14);
  other.inode = 43;
  EXPECT_EQ(Find({Image(100, 110, 4), other}).size(), 2U);
}

TEST(FindAreas, WhatTheProgramAskedForTheMemoryParts) {
  for (const char* flag : {"hg", "nh", "dd", "dc", "mg", "lo", "nr"}) {
    auto other = Image(110, 112, 14);
    other.vm_flags = {"rd", flag};
    const auto areas = Find({Image(100, 110, 4), other});
    ASSERT_EQ(areas.size(), 2U) << flag;
    EXPECT_TRUE(areas[1].HasFlag(flag));
  }
}

TEST(FindAreas, WhatBacksTheMemoryDoesNotPart) {
  auto other = Image(110, 112, 14);
  other.vm_flags = {"rd", "wr", "um", "uw"};
  EXPECT_EQ(Find({Image(100, 110, 4), other}).size(), 1U);
}

TEST(FindAreas, PiecesGivenBackBelongToTheArea) {
  const auto middle = Find({Image(100, 104, 4), Anonymous(104, 106), Image(106, 110, 10)},
                           SetOf({Pages(104, 106)}));
  EXPECT_THAT(RangesOf(middle), ElementsAre(Pages(100, 110)));
  const auto tail = Find({Image(100, 104, 4), Anonymous(104, 106)}, SetOf({Pages(104, 106)}));
  EXPECT_THAT(RangesOf(tail), ElementsAre(Pages(100, 106)));
  const auto head = Find({Anonymous(96, 100), Image(100, 104, 4)}, SetOf({Pages(96, 100)}));
  ASSERT_THAT(RangesOf(head), ElementsAre(Pages(96, 104)));
  EXPECT_EQ(head[0].OffsetOf(Pages(103, 104).begin), FileOffset(7 * kPageSize));
  EXPECT_EQ(head[0].file_vma, Pages(100, 104));
}

TEST(FindAreas, APieceGivenBackBelowTheFilesFirstPageStillGivesRightOffsets) {
  const auto head = Find({Anonymous(96, 100), Image(100, 104, 1)}, SetOf({Pages(96, 100)}));
  ASSERT_THAT(RangesOf(head), ElementsAre(Pages(96, 104)));
  EXPECT_EQ(head[0].OffsetOf(Pages(100, 101).begin), FileOffset(kPageSize));
}

TEST(FindAreas, TwoPiecesGivenBackBeforeTheImageAreOneHead) {
  const auto areas =
      Find({Anonymous(94, 96), Anonymous(96, 100), Image(100, 104, 9)}, SetOf({Pages(94, 100)}));
  EXPECT_THAT(RangesOf(areas), ElementsAre(Pages(94, 104)));
}

TEST(FindAreas, OtherAnonymousMemoryIsNotTaken) {
  EXPECT_THAT(RangesOf(Find({Image(100, 104, 4), Anonymous(104, 106), Image(106, 110, 10)})),
              ElementsAre(Pages(100, 104), Pages(106, 110)));
  // Partly dropped only: the kernel joined it with something of the program's.
  EXPECT_THAT(RangesOf(Find({Image(100, 104, 4), Anonymous(104, 106)}, SetOf({Pages(104, 105)}))),
              ElementsAre(Pages(100, 104)));
}

TEST(FindAreas, OnlyGivenBackIsNoArea) {
  EXPECT_THAT(Find({Anonymous(104, 106)}, SetOf({Pages(104, 106)})), IsEmpty());
  EXPECT_THAT(Find({}), IsEmpty());
}

TEST(FindAreas, SharedOrSpecialMemoryIsNeverTakenForGivenBack) {
  auto shared = Anonymous(104, 106);
  shared.shared = true;
  EXPECT_THAT(RangesOf(Find({Image(100, 104, 4), shared}, SetOf({Pages(104, 106)}))),
              ElementsAre(Pages(100, 104)));
  auto special = Anonymous(104, 106);
  special.name = "[vdso]";
  EXPECT_THAT(RangesOf(Find({Image(100, 104, 4), special}, SetOf({Pages(104, 106)}))),
              ElementsAre(Pages(100, 104)));
}

TEST(CutIntoBlocks, CutsAtMultiplesOfTwoMebibytes) {
  EXPECT_THAT(CutIntoBlocks(Pages(510, 1030)),
              ElementsAre(Pages(510, 512), Pages(512, 1024), Pages(1024, 1030)));
  EXPECT_THAT(CutIntoBlocks(Pages(512, 1024)), ElementsAre(Pages(512, 1024)));
  EXPECT_THAT(CutIntoBlocks(Pages(5, 6)), ElementsAre(Pages(5, 6)));
  EXPECT_THAT(CutIntoBlocks(Pages(5, 5)), IsEmpty());
}

TEST(ContentOf, OwnPagesWinAndDroppedOnesAreNotTakenFromTheImage) {
  const auto content =
      ContentOf(Pages(0, 10), SetOf({Pages(0, 8)}), SetOf({Pages(2, 3), Pages(5, 6), Pages(9, 12)}),
                SetOf({Pages(4, 7)}));
  EXPECT_THAT(content.own, ElementsAre(Pages(2, 3), Pages(5, 6), Pages(9, 10)));
  EXPECT_THAT(content.image, ElementsAre(Pages(0, 2), Pages(3, 4), Pages(7, 8)));
  EXPECT_EQ(content.size(), Bytes(7 * kPageSize));
}

TEST(ContentOf, NothingPresentIsNothingToCopy) {
  EXPECT_EQ(ContentOf(Pages(0, 10), {}, {}, {}).size(), Bytes(0));
  EXPECT_EQ(ContentOf(Pages(0, 10), SetOf({Pages(0, 10)}), {}, SetOf({Pages(0, 10)})).size(),
            Bytes(0));
}

TEST(ContentOf, OnlyAWholeAlignedBlockIsFitForAHugePage) {
  const VaddrRange block = Pages(512, 1024);
  const RangeSet all = SetOf({Pages(0, 4096)});
  EXPECT_TRUE(ContentOf(block, all, {}, {}).IsFullBlock(block));
  EXPECT_TRUE(
      ContentOf(block, all, SetOf({Pages(600, 700)}), SetOf({Pages(650, 660)})).IsFullBlock(block));
  EXPECT_FALSE(ContentOf(block, all, {}, SetOf({Pages(650, 651)})).IsFullBlock(block));
  const VaddrRange part = Pages(512, 1023);
  EXPECT_FALSE(ContentOf(part, all, {}, {}).IsFullBlock(part));
  const VaddrRange shifted = Pages(513, 1025);
  EXPECT_FALSE(ContentOf(shifted, all, {}, {}).IsFullBlock(shifted));
}

constexpr Bytes kFirst(16 << 20);
constexpr Bytes kMost(64 << 20);

TEST(Pacer, ShrinksWhenPausesAreTooLongAndNeverBelowABlock) {
  Pacer pacer(Nanos(1'000'000), kFirst, kMost);
  pacer.Swapped(Nanos(1'500'000));
  EXPECT_EQ(pacer.batch_size(), Bytes(8 << 20));
  for (int i = 0; i < 10; ++i) pacer.Swapped(Nanos(1'500'000));
  EXPECT_EQ(pacer.batch_size(), Bytes(kHugePageSize));
  pacer.TooDirty();
  EXPECT_EQ(pacer.batch_size(), Bytes(kHugePageSize));
}

TEST(Pacer, GrowsWhenPausesAreShortAndNeverBeyondItsLimit) {
  Pacer pacer(Nanos(1'000'000), kFirst, kMost);
  pacer.Swapped(Nanos(700'000));
  EXPECT_EQ(pacer.batch_size(), kFirst);
  for (int i = 0; i < 20; ++i) pacer.Swapped(Nanos(100'000));
  EXPECT_EQ(pacer.batch_size(), kMost);
  pacer.TooDirty();
  EXPECT_EQ(pacer.batch_size(), Bytes(32 << 20));
}

TEST(Pacer, AllowsMoreDirtyPagesTheLongerThePauseMayBe) {
  const Pacer shortest(Nanos(1'000), kFirst, kMost);
  const Pacer longer(Nanos(5'000'000), kFirst, kMost);
  EXPECT_GE(shortest.dirty_limit().value, kHugePageSize / kPageSize);  // one block always fits
  EXPECT_GT(longer.dirty_limit(), shortest.dirty_limit());
}

}  // namespace
}  // namespace unmoor
