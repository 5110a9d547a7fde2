#include "criu/rewrite.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <sys/mman.h>

#include <map>
#include <stdexcept>

#include "criu/image_codec.h"
#include "criu/metadata.h"
#include "criu/page_images.h"
#include "os/file.h"
#include "proto/image.pb.h"

namespace unmoor::criu {
namespace {

using ::testing::HasSubstr;

void Require(const Result<>& result) {
  if (!result) throw std::runtime_error(result.error().message());
}

class Rewrite : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = MakeTemporaryDirectory("/tmp", "unmoor-rewrite-test-").value();
    images_ = root_ + "/criu";
    view_ = root_ + "/view";
    Require(MakeDirectory(images_));
    Require(MakeDirectory(view_));
    ImageBuilder files(ImageType::kFiles);
    proto::FileEntry entry;
    entry.set_type(2);
    entry.set_id(41);
    entry.mutable_unknown_fields()->append("\x92\x01\x02hi");  // field 18, a pipe
    files.Append(entry.SerializeAsString());
    Require(WriteFile(images_ + "/files.img", files.data()));
    Require(WriteFile(images_ + "/core-7.img", "core"));
    Require(WriteFile(images_ + "/stats-restore", "old"));
    WriteMm(7, {Anonymous(0x100000, 0x200000), Anonymous(0x200000, 0x240000, PROT_READ),
                Special(0x300000, 0x310000), Anonymous(0x400000, 0x500000)});
    WriteMm(8, {Anonymous(0x100000, 0x200000)});
  }
  void TearDown() override { Require(RemoveTree(root_)); }

  static proto::VmaEntry Anonymous(uint64_t start, uint64_t end, uint32_t prot = 3) {
    proto::VmaEntry vma;
    vma.set_start(start);
    vma.set_end(end);
    vma.set_pgoff(0);
    vma.set_shmid(0);
    vma.set_prot(prot);
    vma.set_flags(MAP_PRIVATE | MAP_ANONYMOUS);
    vma.set_status(kVmaRegular | kVmaAnonPrivate);
    vma.set_fd(-1);
    vma.set_madv(1 << 14);
    vma.mutable_unknown_fields()->append("\xa0\x06\x05");  // field 100 of a later criu
    return vma;
  }
  static proto::VmaEntry Special(uint64_t start, uint64_t end) {
    proto::VmaEntry vma = Anonymous(start, end);
    vma.set_status(kVmaRegular | kVmaVdso | kVmaAnonPrivate);
    return vma;
  }
  void WriteMm(int vpid, const std::vector<proto::VmaEntry>& vmas) {
    proto::MmEntry mm;
    for (const auto set :
         {&proto::MmEntry::set_start_code, &proto::MmEntry::set_end_code,
          &proto::MmEntry::set_start_data, &proto::MmEntry::set_end_data,
          &proto::MmEntry::set_start_stack, &proto::MmEntry::set_start_brk,
          &proto::MmEntry::set_brk, &proto::MmEntry::set_arg_start, &proto::MmEntry::set_arg_end,
          &proto::MmEntry::set_env_start, &proto::MmEntry::set_env_end}) {
      (mm.*set)(4096);
    }
    mm.set_exe_file_id(1);
    for (const auto& vma : vmas) *mm.add_vmas() = vma;
    mm.mutable_unknown_fields()->append("\x78\x01");  // field 15, dumpable
    ImageBuilder builder(ImageType::kMm);
    builder.Append(mm.SerializeAsString());
    Require(WriteFile(fmt::format("{}/mm-{}.img", images_, vpid), builder.data()));
  }
  proto::MmEntry ReadMm(int vpid) {
    const auto image =
        RawImage::Read(fmt::format("{}/mm-{}.img", view_, vpid), ImageType::kMm).value();
    return ParseMessage<proto::MmEntry>(image, image.messages()[0]).value();
  }
  std::vector<proto::FileEntry> ReadFiles() {
    const auto image = RawImage::Read(view_ + "/files.img", ImageType::kFiles).value();
    std::vector<proto::FileEntry> files;
    for (const auto& raw : image.messages()) {
      files.push_back(ParseMessage<proto::FileEntry>(image, raw).value());
    }
    return files;
  }
  Result<> Map(const std::vector<TaskMapping>& tasks) {
    return RewriteForDirectMap(images_, view_, tasks);
  }
  static DirectMapping Mapping(uint64_t begin, uint64_t end, uint32_t layer = 0,
                               uint64_t offset = 0x10000) {
    return {{Vaddr(begin), Vaddr(end)}, layer, FileOffset(offset)};
  }

  std::string root_;
  std::string images_;
  std::string view_;
};

// CRIU's pages are 'a', 'b' … by their order; the layer's 'A', 'B' … by their offset.
TEST_F(Rewrite, WhatWasMappedIsAnonymousAgain) {
  Require(Map({{7, {Mapping(0x100000, 0x240000)}}, {8, {Mapping(0x100000, 0x200000)}}}));
  ASSERT_NE(ReadFile(view_ + "/mm-7.img").value(), ReadFile(images_ + "/mm-7.img").value());
  const std::vector<MappedTask> tasks = {{7, {{Vaddr(0x100000), Vaddr(0x240000)}}},
                                         {8, {{Vaddr(0x80000), Vaddr(0x200000)}}}};
  Require(MakeAnonymousAgain(view_, tasks));
  for (const char* const name : {"/mm-7.img", "/mm-8.img", "/files.img"}) {
    EXPECT_EQ(ReadFile(view_ + name).value(), ReadFile(images_ + name).value()) << name;
  }
}

TEST_F(Rewrite, WhatIsNoneOfOursStaysAFileMapping) {
  Require(Map({{7, {Mapping(0x100000, 0x240000), Mapping(0x400000, 0x500000, 1)}}}));
  const std::string files = ReadFile(view_ + "/files.img").value();
  Require(MakeAnonymousAgain(view_,
                             std::vector<MappedTask>{{7, {{Vaddr(0x100000), Vaddr(0x200000)}}}}));
  EXPECT_EQ(ReadFile(view_ + "/files.img").value(), files) << "one file is mapped still";
  Require(MakeAnonymousAgain(view_,
                             std::vector<MappedTask>{{7, {{Vaddr(0x100000), Vaddr(0x240000)}}}}));
  const proto::MmEntry mm = ReadMm(7);
  EXPECT_EQ(mm.vmas(0).status(), kVmaRegular | kVmaAnonPrivate);
  EXPECT_EQ(mm.vmas(3).status(), kVmaRegular | kVmaFilePrivate);
  EXPECT_EQ(ReadFiles().size(), 2u) << "of three, the one file that nothing maps is forgotten";
}

TEST_F(Rewrite, PagesOfDeltasAreMergedWithCriusAndWin) {
  const auto pages = [](char first, size_t count) {
    std::string text;
    for (size_t i = 0; i < count; ++i) text.append(kPageSize, static_cast<char>(first + i));
    return text;
  };
  const PageStreamId id{StreamKind::kTask, 7};
  PageImageWriter writer(images_);
  Require(writer.Open(id));
  const std::string criu_pages = pages('a', 6);
  const auto criu = std::as_bytes(std::span(criu_pages));
  Require(writer.Pages(id, Vaddr(0x100000), 0, criu.first(4 * kPageSize)));
  Require(writer.Absent(id, {Vaddr(0x104000), Vaddr(0x106000)}, kPageLazy));
  Require(writer.Pages(id, Vaddr(0x300000), 0, criu.subspan(4 * kPageSize)));
  Require(writer.Finish(false));
  const std::string layer_path = root_ + "/layer";
  Require(WriteFile(layer_path, pages('A', 8)));
  const Fd layer = OpenFile(layer_path, O_RDONLY).value();

  TaskMapping task{7, {Mapping(0x100000, 0x240000)}};
  task.loads = {Mapping(0xff000, 0x100000, 0, 0x7000), Mapping(0x101000, 0x102000, 0, 0x1000),
                Mapping(0x103000, 0x105000, 0, 0x3000), Mapping(0x200000, 0x201000, 0, 0)};
  const std::vector<LayerFile> files = {{layer.get(), layer_path}};
  const auto done = RewriteForDirectMap(images_, view_, std::vector{task}, files);
  ASSERT_TRUE(done) << done.error().message();

  const Pagemap merged = ReadPagemap(view_, id).value();
  const std::string data = ReadFile(view_ + "/" + PagesName(merged.pages_id)).value();
  std::map<uint64_t, char> found;
  for (const PagemapEntry& entry : merged.entries) {
    for (uint64_t at = 0; at < entry.range.size().value; at += kPageSize) {
      const bool present = (entry.flags & kPagePresent) != 0;
      found[entry.range.begin.value + at] = present ? data.at(entry.pages.value + at) : '-';
    }
  }
  const std::map<uint64_t, char> expected = {
      {0xff000, 'H'},  {0x100000, 'a'}, {0x101000, 'B'}, {0x102000, 'c'}, {0x103000, 'D'},
      {0x104000, 'E'}, {0x105000, '-'}, {0x200000, 'A'}, {0x300000, 'e'}, {0x301000, 'f'}};
  EXPECT_EQ(found, expected);
  EXPECT_EQ(data.size(), 9 * kPageSize);
}

TEST_F(Rewrite, MappedVmasNameTheLayersFileAtTheirOffset) {
  const auto done = Map({{7, {Mapping(0x100000, 0x240000, 3)}}});
  ASSERT_TRUE(done) << done.error().message();
  const auto files = ReadFiles();
  ASSERT_EQ(files.size(), 2u);
  EXPECT_EQ(files[1].reg().name(), "/unmoor-layer-3");
  EXPECT_EQ(files[1].id(), 42u);
  const proto::MmEntry mm = ReadMm(7);
  EXPECT_EQ(mm.vmas(0).status(), kVmaRegular | kVmaFilePrivate);
  EXPECT_EQ(mm.vmas(0).flags(), static_cast<uint32_t>(MAP_PRIVATE));
  EXPECT_EQ(mm.vmas(0).shmid(), 42u);
  EXPECT_EQ(mm.vmas(0).pgoff(), 0x10000u);
  EXPECT_TRUE(mm.vmas(0).has_fdflags());
  EXPECT_EQ(mm.vmas(1).pgoff(), 0x110000u) << "a range of several VMAs goes on in the file";
  EXPECT_EQ(mm.vmas(1).prot(), static_cast<uint32_t>(PROT_READ));
  EXPECT_EQ(mm.vmas(3).status(), kVmaRegular | kVmaAnonPrivate) << "others are untouched";
}

TEST_F(Rewrite, FieldsUnknownToUsAreKept) {
  ASSERT_TRUE(Map({{7, {Mapping(0x400000, 0x500000)}}}));
  const proto::MmEntry mm = ReadMm(7);
  EXPECT_EQ(mm.unknown_fields(), "\x78\x01");
  EXPECT_EQ(mm.vmas(3).unknown_fields(), "\xa0\x06\x05");
  EXPECT_EQ(mm.vmas(3).madv(), 1u << 14);
  EXPECT_THAT(ReadFiles()[0].unknown_fields(), HasSubstr("hi"));
}

TEST_F(Rewrite, TasksNeverShareAFileId) {
  ASSERT_TRUE(Map({{7, {Mapping(0x100000, 0x200000), Mapping(0x400000, 0x500000)}},
                   {8, {Mapping(0x100000, 0x200000)}}}));
  EXPECT_EQ(ReadFiles().size(), 3u);
  EXPECT_EQ(ReadMm(7).vmas(0).shmid(), ReadMm(7).vmas(3).shmid());
  EXPECT_NE(ReadMm(7).vmas(0).shmid(), ReadMm(8).vmas(0).shmid());
}

TEST_F(Rewrite, TheViewLinksEverythingElse) {
  ASSERT_TRUE(Map({{7, {Mapping(0x400000, 0x500000)}}}));
  EXPECT_EQ(ReadFile(view_ + "/core-7.img").value(), "core");
  EXPECT_EQ(RealPath(view_ + "/mm-8.img").value(), RealPath(images_ + "/mm-8.img").value());
  EXPECT_FALSE(Exists(view_ + "/stats-restore")) << "criu would write through the link";
}

TEST_F(Rewrite, RefusesRangesThatAreNotWholeVmas) {
  for (const auto& bad :
       {Mapping(0x100000, 0x180000), Mapping(0x180000, 0x200000), Mapping(0x0f0000, 0x200000),
        Mapping(0x100000, 0x280000), Mapping(0x600000, 0x700000)}) {
    const auto done = Map({{7, {bad}}});
    ASSERT_FALSE(done) << fmt::format("{}", bad.range);
    EXPECT_THAT(done.error().message(), HasSubstr("mm-7.img"));
    EXPECT_THAT(done.error().message(), HasSubstr("whole VMAs"));
  }
}

TEST_F(Rewrite, RefusesSpecialVmas) {
  const auto done = Map({{7, {Mapping(0x300000, 0x310000)}}});
  ASSERT_FALSE(done);
  EXPECT_THAT(done.error().message(), HasSubstr("it is a special mapping"));
}

TEST_F(Rewrite, RefusesUnsortedUnalignedOrAbsent) {
  EXPECT_FALSE(Map({{7, {Mapping(0x400000, 0x500000), Mapping(0x100000, 0x200000)}}}));
  EXPECT_FALSE(Map({{7, {Mapping(0x100000, 0x200000, 0, 12)}}}));
  EXPECT_FALSE(Map({{9, {Mapping(0x100000, 0x200000)}}}));
}

}  // namespace
}  // namespace unmoor::criu
