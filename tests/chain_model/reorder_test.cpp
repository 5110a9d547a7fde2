// Reorder: in which order pages get their place, that they are the same pages afterwards, and what
// is refused.
#include "store/reorder.h"

#include <gmock/gmock.h>

#include "image/pack.h"
#include "image/verify.h"
#include "image/working_set.h"
#include "image_fixture.h"
#include "os/file_hook.h"
#include "os/storage.h"

namespace unmoor {
namespace {

using testing::HasSubstr;

FileRange At(uint64_t first_page, uint64_t pages) {
  return {FileOffset(first_page * kPageSize), FileOffset((first_page + pages) * kPageSize)};
}

TEST(OrderPages, WhatIsWantedComesFirstInItsOrder) {
  const PageOrder order = OrderPages({At(30, 2), At(2, 3)}, {At(0, 10), At(28, 8)});
  EXPECT_EQ(order.first, (std::vector{At(30, 2), At(2, 3)}));
  EXPECT_EQ(order.rest, (std::vector{At(0, 2), At(5, 5), At(28, 2), At(32, 4)}));
}

TEST(OrderPages, HolesGetNoPlaceAndNothingComesTwice) {
  const PageOrder order = OrderPages({At(0, 40), At(8, 4), At(50, 1)}, {At(4, 4), At(20, 2)});
  EXPECT_EQ(order.first, (std::vector{At(4, 4), At(20, 2)}));
  EXPECT_TRUE(order.rest.empty());
}

TEST(OrderPages, NeighboursAreOne) {
  const PageOrder order = OrderPages({At(4, 2), At(6, 2), At(3, 1)}, {At(0, 16)});
  EXPECT_EQ(order.first, (std::vector{At(4, 4), At(3, 1)}));
  EXPECT_EQ(order.rest, (std::vector{At(0, 3), At(8, 8)}));
}

// An image of one layer, and which of its pages are wanted: blocks far apart, last ones first, and
// larger than the small holes of a disk in use, which ext4 fills first.
constexpr uint64_t kWantedBlocks = 20;
constexpr Bytes kWantedBlock(64 * kPageSize);

class ReorderTest : public testing::Test {
 protected:
  ReorderTest() {
    EXPECT_TRUE(MakeDirectory(image()));
    auto writer = LayerWriter::Create(LayersDirectory(image()), kTestLayerId).value();
    const VaddrRange vma = Pages(0x7f0000123000, 4096);
    EXPECT_TRUE(writer.AddTask(7, std::vector{vma}));
    EXPECT_TRUE(writer.Write(7, vma.begin, PageContents(7, vma.begin, 4000)));
    const auto layer = writer.Finish(true);
    EXPECT_TRUE(layer);
    Manifest manifest = MakeTestManifest(*layer);
    std::erase_if(manifest.tasks, [](const ManifestTask& task) { return task.vpid != 7; });
    EXPECT_TRUE(WriteManifest(image(), manifest));
    const FileOffset begin = layer->segments.front().offset;
    WorkingSet set{{kTestLayerId}, {}};
    for (uint64_t i = 0; i < kWantedBlocks; ++i) {
      const FileOffset at = begin + Bytes((3900 - i * 190) * kPageSize);
      set.ranges.push_back({0, {at, at + kWantedBlock}});
    }
    EXPECT_TRUE(WriteWorkingSet(image(), manifest.checkpoint_id, set));
  }
  [[nodiscard]] std::string image() const { return dir_.path() + "/image"; }
  [[nodiscard]] std::string pages() const { return LayerPagesPath(image(), kTestLayerId); }
  [[nodiscard]] LayerVerdict Verdict() const {
    return VerifyLayer(image(), kTestLayerId, nullptr, {});
  }

 private:
  const TemporaryDirectory dir_{"/var/tmp"};  // on a disk, of which can be told where data lies
};

TEST_F(ReorderTest, TheSamePagesLieInFewerPieces) {
  const std::string link = image() + ".link";
  ASSERT_OK(HardLink(pages(), link));
  const struct stat before = Stat(pages()).value();
  const auto plan = Reorder({image(), true, {}});
  ASSERT_OK(plan);
  EXPECT_EQ(plan->written_layers, 1u);
  EXPECT_EQ(Stat(pages())->st_ino, before.st_ino) << "a dry run writes nothing";
  Bytes told;
  const auto report = Reorder({image(), false, [&](Bytes done, Bytes total) {
                                 EXPECT_LE(done, total);
                                 told = done;
                               }});
  ASSERT_OK(report);
  EXPECT_EQ(report->working_set, Bytes(kWantedBlocks * kWantedBlock.value));
  EXPECT_EQ(report->placed, Bytes(kWantedBlocks * kWantedBlock.value));
  EXPECT_EQ(report->written, told);
  EXPECT_EQ(report->written, plan->written);
  EXPECT_TRUE(Verdict().damages.empty());
  EXPECT_EQ(Stat(link)->st_ino, before.st_ino) << "who shares the old file keeps it";
  EXPECT_NE(Stat(pages())->st_ino, before.st_ino);
  EXPECT_EQ(ListDirectory(LayersDirectory(image()))->size(), 2u) << "nothing is left";
  if (!report->extents_before) GTEST_SKIP() << "this file system does not tell where data lies";
  EXPECT_EQ(report->extents_before, plan->extents_before);
  EXPECT_GE(*report->extents_before, 10u);
  // Others who write at that moment may take the places between; it need not be the first time.
  auto again = report;
  for (int i = 0; i < 20 && *again->extents_after >= *report->extents_before / 2; ++i) {
    again = Reorder({image(), false, {}});
    ASSERT_OK(again);
  }
  EXPECT_LT(*again->extents_after, *report->extents_before / 2);
}

TEST_F(ReorderTest, ADamagedLayerStaysAsItIs) {
  const struct stat before = Stat(pages()).value();
  {
    const Fd fd = OpenFile(pages(), 2 /*O_RDWR*/).value();
    const auto data = DataRanges(fd.get(), {FileOffset(0), FileOffset(1 << 30)}, pages());
    ASSERT_OK(WriteExactlyAt(fd.get(), std::vector<std::byte>(8, std::byte{1}), data->front().begin,
                             pages()));
  }
  const auto report = Reorder({image(), false, {}});
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().kind(), ErrorKind::kUser);
  EXPECT_EQ(Stat(pages())->st_ino, before.st_ino);
  EXPECT_EQ(ListDirectory(LayersDirectory(image()))->size(), 2u);
}

TEST_F(ReorderTest, WhatCannotBeOrderedIsRefused) {
  ASSERT_OK(RemoveFile(WorkingSetPath(image())));
  auto report = Reorder({image(), false, {}});
  ASSERT_FALSE(report);
  EXPECT_THAT(report.error().message(), HasSubstr("unmoor record"));
  ASSERT_OK(PackDirectory(image(), {}, {}, {}));
  report = Reorder({image(), false, {}});
  ASSERT_FALSE(report);
  EXPECT_THAT(report.error().message(), HasSubstr("unpack"));
}

#ifdef UNMOOR_FAULT_POINTS

TEST_F(ReorderTest, AFileIsReplacedOnlyByOneThatIsOnTheDisk) {
  std::vector<std::string> calls;
  SetFileHook([&](const FileCall& call) {
    const bool pending = call.path.find(kTestLayerId) != std::string::npos;
    if (pending || call.path.ends_with("/layers")) calls.emplace_back(call.name);
    return 0;
  });
  const auto report = Reorder({image(), false, {}});
  SetFileHook({});
  ASSERT_OK(report);
  // Of the calls that change or flush something: the last write, then these.
  std::erase_if(calls, [](const std::string& name) {
    return name != "pwrite" && name != "fsync" && name != "rename";
  });
  ASSERT_GE(calls.size(), 4u);
  const std::vector<std::string> end(calls.end() - 4, calls.end());
  EXPECT_EQ(end, (std::vector<std::string>{"pwrite", "fsync", "rename", "fsync"}));
}

#endif  // UNMOOR_FAULT_POINTS

}  // namespace
}  // namespace unmoor
