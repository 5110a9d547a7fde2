#include "criu/page_images.h"

#include <gmock/gmock.h>

#include <stdexcept>

#include "criu/image_codec.h"
#include "os/file.h"
#include "proto/image.pb.h"

namespace unmoor::criu {
namespace {

using ::testing::HasSubstr;

constexpr PageStreamId kTask7{StreamKind::kTask, 7};
constexpr PageStreamId kShared9{StreamKind::kSharedMemory, 9};

class PageImages : public ::testing::Test {
 protected:
  void SetUp() override { root_ = MakeTemporaryDirectory("/tmp", "unmoor-pages-test-").value(); }
  void TearDown() override { ASSERT_TRUE(RemoveTree(root_)); }
  static std::vector<std::byte> Filled(size_t pages, int value) {
    return std::vector<std::byte>(pages * kPageSize, std::byte(value));
  }
  std::string root_;
};

TEST_F(PageImages, WhatWasWrittenIsReadBack) {
  PageImageWriter writer(root_);
  ASSERT_TRUE(writer.Open(kTask7));
  EXPECT_FALSE(writer.HasEntries(kTask7));
  ASSERT_TRUE(writer.Pages(kTask7, Vaddr(0x10000), kPagePresent, Filled(2, 1)));
  ASSERT_TRUE(writer.Pages(kTask7, Vaddr(0x12000), kPagePresent, Filled(1, 2)));
  ASSERT_TRUE(writer.Absent(kTask7, {Vaddr(0x20000), Vaddr(0x23000)}, kPageInParent));
  ASSERT_TRUE(writer.Pages(kTask7, Vaddr(0x30000), kPagePresent | kPageLazy, Filled(1, 3)));
  ASSERT_TRUE(writer.Open(kShared9));
  ASSERT_TRUE(writer.Pages(kShared9, Vaddr(0), kPagePresent, Filled(1, 4)));
  EXPECT_TRUE(writer.HasEntries(kTask7));
  ASSERT_TRUE(writer.Finish(true));
  EXPECT_EQ(writer.written(), Bytes(5 * kPageSize));

  const Pagemap task = ReadPagemap(root_, kTask7).value();
  EXPECT_EQ(task.pages_id, 1u);
  ASSERT_EQ(task.entries.size(), 3u);
  EXPECT_EQ(task.entries[0].range, (VaddrRange{Vaddr(0x10000), Vaddr(0x13000)}));
  EXPECT_EQ(task.entries[1].flags, kPageInParent);
  EXPECT_EQ(task.entries[2].pages, FileOffset(3 * kPageSize));
  EXPECT_EQ(task.PresentBytes(), Bytes(4 * kPageSize));
  EXPECT_EQ(ReadPagemap(root_, kShared9).value().pages_id, 2u);
  EXPECT_TRUE(Exists(root_ + "/pagemap-shmem-9.img"));
  EXPECT_EQ(ReadFile(root_ + "/pages-1.img").value().size(), 4 * kPageSize);
}

TEST_F(PageImages, BothPageCountsAreWritten) {
  PageImageWriter writer(root_);
  ASSERT_TRUE(writer.Open(kTask7));
  ASSERT_TRUE(writer.Pages(kTask7, Vaddr(0x10000), kPagePresent, Filled(2, 1)));
  ASSERT_TRUE(writer.Finish(false));
  const auto image = RawImage::Read(root_ + "/pagemap-7.img", ImageType::kPagemap).value();
  const auto entry = ParseMessage<proto::PagemapEntry>(image, image.messages()[1]).value();
  EXPECT_EQ(entry.compat_nr_pages(), 2u);
  EXPECT_EQ(entry.nr_pages(), 2u);
  EXPECT_EQ(entry.flags(), kPagePresent);
}

TEST_F(PageImages, ATaskWithoutAnyEntryIsRefused) {
  PageImageWriter writer(root_);
  ASSERT_TRUE(writer.Open(kTask7));
  const auto done = writer.Finish(false);
  ASSERT_FALSE(done);
  EXPECT_THAT(done.error().message(), HasSubstr("task 7"));
}

TEST_F(PageImages, UnsortedPagesAreRefused) {
  PageImageWriter writer(root_);
  EXPECT_FALSE(writer.Pages(kTask7, Vaddr(0x10000), kPagePresent, Filled(1, 1)));
  ASSERT_TRUE(writer.Open(kTask7));
  ASSERT_TRUE(writer.Pages(kTask7, Vaddr(0x10000), kPagePresent, Filled(2, 1)));
  EXPECT_FALSE(writer.Pages(kTask7, Vaddr(0x11000), kPagePresent, Filled(1, 1)));
}

TEST_F(PageImages, OldEntriesWithOneCountAndNoFlagsAreRead) {
  ImageBuilder builder(ImageType::kPagemap);
  proto::PagemapHead head;
  head.set_pages_id(4);
  builder.Append(head.SerializeAsString());
  proto::PagemapEntry entry;
  entry.set_vaddr(0x1000);
  entry.set_compat_nr_pages(3);
  builder.Append(entry.SerializeAsString());
  ASSERT_TRUE(WriteFile(root_ + "/pagemap-7.img", builder.data()));
  const auto pagemap = ReadPagemap(root_, kTask7);
  ASSERT_TRUE(pagemap) << pagemap.error().message();
  EXPECT_EQ(pagemap->PresentBytes(), Bytes(3 * kPageSize));
}

TEST_F(PageImages, DamagedEntriesAreRefusedWithTheirOffset) {
  const auto with = [&](uint64_t vaddr, uint64_t pages) {
    ImageBuilder builder(ImageType::kPagemap);
    proto::PagemapHead head;
    head.set_pages_id(1);
    builder.Append(head.SerializeAsString());
    proto::PagemapEntry entry;
    entry.set_vaddr(vaddr);
    entry.set_compat_nr_pages(0);
    entry.set_nr_pages(pages);
    builder.Append(entry.SerializeAsString());
    EXPECT_TRUE(WriteFile(root_ + "/pagemap-7.img", builder.data()));
    return ReadPagemap(root_, kTask7);
  };
  EXPECT_TRUE(with(0x1000, 1));
  for (const auto& bad : {with(0x1001, 1), with(0x1000, 0), with(0x1000, uint64_t{1} << 60),
                          with(~uint64_t{0xfff}, 1)}) {
    ASSERT_FALSE(bad);
    EXPECT_THAT(bad.error().message(), HasSubstr("offset 14"));
  }
}

}  // namespace
}  // namespace unmoor::criu
