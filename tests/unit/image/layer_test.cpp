// Layers as written and as read: contents, holes, damage, faults.
#include <fcntl.h>
#include <sys/resource.h>

#include <csignal>
#include <random>

#include "image_fixture.h"
#include "os/fd.h"

namespace unmoor {
namespace {

std::string PagesPath(const std::string& dir) {
  return dir + "/" + kTestLayerId + ".pages";
}
std::string IndexPath(const std::string& dir) {
  return dir + "/" + kTestLayerId + ".index";
}

Result<LayerReader> OpenTestLayer(const std::string& dir) {
  return LayerReader::Open(PagesPath(dir), IndexPath(dir));
}

std::vector<std::byte> ReadAt(const LayerReader& reader, FileOffset offset, uint64_t pages) {
  std::vector<std::byte> bytes(pages * kPageSize);
  EXPECT_TRUE(ReadExactlyAt(reader.pages_fd().get(), bytes, offset, "pages").has_value());
  return bytes;
}

TEST(Layer, EveryPageIsReadBackWhereItsExtentSays) {
  const TemporaryDirectory dir;
  const auto info = MakeTestLayer(dir.path());
  ASSERT_OK(info);
  auto reader = OpenTestLayer(dir.path());
  ASSERT_OK(reader);
  EXPECT_EQ(reader->id(), kTestLayerId);
  EXPECT_EQ(reader->extents(), info->extents);
  EXPECT_EQ(reader->segments(), info->segments);
  EXPECT_EQ(reader->info().index_checksum, info->index_checksum);
  EXPECT_EQ(info->data_bytes.value, 2 * (20 + 61) * kPageSize);
  EXPECT_EQ(info->segments.size(), 6u);
  for (const Segment& segment : reader->segments()) {
    const uint64_t pages = segment.range.size().value / kPageSize;
    EXPECT_EQ(ReadAt(*reader, segment.offset, pages),
              PageContents(segment.task_vpid, segment.range.begin, pages));
  }
  ASSERT_OK(reader->LoadHashes());
  ASSERT_OK(reader->VerifyAll());
}

TEST(Layer, SameAddressesOfTwoTasksAreApart) {
  const TemporaryDirectory dir;
  ASSERT_OK(MakeTestLayer(dir.path()));
  auto reader = OpenTestLayer(dir.path());
  ASSERT_OK(reader);
  const Extent* a = reader->FindExtent(7, Vaddr(0x7f0000123000));
  const Extent* b = reader->FindExtent(8, Vaddr(0x7f0000123000));
  ASSERT_TRUE(a != nullptr && b != nullptr);
  EXPECT_NE(a->offset, b->offset);
  EXPECT_EQ(reader->FindExtent(9, Vaddr(0x7f0000123000)), nullptr);
  EXPECT_EQ(reader->FindExtent(7, Vaddr(0x7f0000123000 + 40 * kPageSize)), nullptr);
}

TEST(Layer, PageImageHasHolesForZeroPages) {
  const TemporaryDirectory dir;
  const VaddrRange vma = Pages(0x600000000000, 1024);
  auto writer = LayerWriter::Create(dir.path(), kTestLayerId);
  ASSERT_OK(writer);
  ASSERT_OK(writer->AddTask(1, std::vector{vma}));
  std::vector<std::byte> pages(1024 * kPageSize);
  std::fill_n(pages.begin() + 500 * kPageSize, 20 * kPageSize, std::byte{1});
  pages[900 * kPageSize + 4095] = std::byte{1};
  ASSERT_OK(writer->Write(1, vma.begin, pages));
  const auto info = writer->Finish(true);
  ASSERT_OK(info);
  EXPECT_EQ(info->data_bytes.value, 21 * kPageSize);
  EXPECT_LE(info->allocated.value, 40 * kPageSize);
  auto reader = OpenTestLayer(dir.path());
  ASSERT_OK(reader);
  EXPECT_EQ(ReadAt(*reader, info->extents[0].offset, 1024), pages);
  ASSERT_OK(reader->LoadHashes());
  ASSERT_OK(reader->VerifyAll());
}

TEST(Layer, PagesOfZerosAreKeptInALayerThatLiesOverOthers) {
  const TemporaryDirectory dir;
  const VaddrRange vma = Pages(0x600000000000, 64);
  auto writer = LayerWriter::Create(dir.path(), kTestLayerId, WriteBack::kLater, ZeroPages::kKeep);
  ASSERT_OK(writer);
  ASSERT_OK(writer->AddTask(1, std::vector{vma}));
  std::vector<std::byte> pages(8 * kPageSize);
  std::fill_n(pages.begin() + 2 * kPageSize, kPageSize, std::byte{1});
  ASSERT_OK(writer->Write(1, vma.begin + Bytes(14 * kPageSize), pages));
  ASSERT_OK(
      writer->Write(1, vma.begin + Bytes(40 * kPageSize), std::span(pages).first(2 * kPageSize)));
  const auto info = writer->Finish(true);
  ASSERT_OK(info);
  EXPECT_EQ(info->data_bytes.value, 10 * kPageSize);
  ASSERT_EQ(info->segments.size(), 2u);
  EXPECT_EQ(info->segments[0].range, Pages(vma.begin.value + 14 * kPageSize, 8));
  auto reader = OpenTestLayer(dir.path());
  ASSERT_OK(reader);
  EXPECT_EQ(reader->segments(), info->segments);
  EXPECT_EQ(ReadAt(*reader, info->segments[0].offset, 8), pages);
  ASSERT_OK(reader->LoadHashes());
  ASSERT_OK(reader->VerifyAll());
}

TEST(Layer, GrowthGapReadsZero) {
  const TemporaryDirectory dir;
  const auto info = MakeTestLayer(dir.path());
  ASSERT_OK(info);
  auto reader = OpenTestLayer(dir.path());
  ASSERT_OK(reader);
  for (const Extent& extent : reader->extents()) {
    EXPECT_EQ(ReadAt(*reader, extent.file_range().end, 512),
              std::vector<std::byte>(512 * kPageSize));
  }
}

TEST(Layer, SplittingOfWritesDoesNotMatter) {
  const VaddrRange vma = Pages(0x7f0000101000, 3000);
  std::vector<std::byte> pages = PageContents(5, vma.begin, 3000);
  std::mt19937 random(1);
  for (int i = 0; i < 300; ++i) {
    std::fill_n(pages.begin() + static_cast<long>(random() % 3000 * kPageSize), kPageSize,
                std::byte{0});
  }
  std::vector<uint64_t> checksums;
  for (const size_t most : {1u, 7u, 300u, 3000u}) {
    const TemporaryDirectory dir;
    auto writer = LayerWriter::Create(dir.path(), kTestLayerId);
    ASSERT_OK(writer);
    ASSERT_OK(writer->AddTask(5, std::vector{vma}));
    for (size_t page = 0; page < 3000;) {
      const size_t n = std::min<size_t>(1 + random() % most, 3000 - page);
      ASSERT_OK(writer->Write(5, vma.begin + Bytes(page * kPageSize),
                              std::span(pages).subspan(page * kPageSize, n * kPageSize)));
      page += n;
    }
    const auto info = writer->Finish(false);
    ASSERT_OK(info);
    checksums.push_back(info->index_checksum);
    auto reader = OpenTestLayer(dir.path());
    ASSERT_OK(reader);
    EXPECT_EQ(ReadAt(*reader, info->extents[0].offset, 3000), pages);
    ASSERT_OK(reader->LoadHashes());
    ASSERT_OK(reader->VerifyAll());
  }
  for (const uint64_t checksum : checksums) EXPECT_EQ(checksum, checksums[0]);
}

TEST(Layer, TasksMayBeOpenAtOnceInAnyOrder) {
  const TemporaryDirectory dir;
  const VaddrRange vma = Pages(0x7f0000000000, 6000);
  auto writer = LayerWriter::Create(dir.path(), kTestLayerId, WriteBack::kAsItGoes);
  ASSERT_OK(writer);
  for (const uint32_t task : {9u, 3u, 5u}) ASSERT_OK(writer->AddTask(task, std::vector{vma}));
  for (uint64_t page = 0; page < 6000; page += 3) {
    const Vaddr at = vma.begin + Bytes(page * kPageSize);
    for (const uint32_t task : {3u, 5u, 9u}) {
      ASSERT_OK(writer->Write(task, at, PageContents(task, at, 3)));
    }
  }
  const auto info = writer->Finish(false);
  ASSERT_OK(info);
  EXPECT_EQ(info->segments.size(), 3u);
  auto reader = OpenTestLayer(dir.path());
  ASSERT_OK(reader);
  ASSERT_OK(reader->LoadHashes());
  ASSERT_OK(reader->VerifyAll());
  for (const Segment& s : reader->segments()) {
    EXPECT_EQ(ReadAt(*reader, s.offset, 6000), PageContents(s.task_vpid, vma.begin, 6000));
  }
}

TEST(Layer, ReservedRoomIsFilledWithoutACopy) {
  const TemporaryDirectory dir;
  const VaddrRange vma = Pages(0x7f0000000000, 1000);
  auto writer = LayerWriter::Create(dir.path(), kTestLayerId);
  ASSERT_OK(writer);
  ASSERT_OK(writer->AddTask(2, std::vector{vma}));
  const auto pages = PageContents(2, vma.begin, 1000);
  for (size_t done = 0; done < pages.size();) {
    const auto room = writer->Reserve(2, vma.begin + Bytes(done), Bytes(pages.size() - done));
    ASSERT_OK(room);
    ASSERT_GE(room->size(), kPageSize);
    std::memcpy(room->data(), &pages[done], room->size());
    ASSERT_OK(writer->Commit(Bytes(room->size())));
    done += room->size();
  }
  const auto info = writer->Finish(false);
  ASSERT_OK(info);
  auto reader = OpenTestLayer(dir.path());
  ASSERT_OK(reader);
  EXPECT_EQ(ReadAt(*reader, info->extents[0].offset, 1000), pages);
}

TEST(Layer, WritesOutsideOfVmasOrOutOfOrderAreRefused) {
  const TemporaryDirectory dir;
  const VaddrRange vma = Pages(0x7f0000000000, 4);
  auto writer = LayerWriter::Create(dir.path(), kTestLayerId);
  ASSERT_OK(writer);
  ASSERT_OK(writer->AddTask(2, std::vector{vma}));
  const auto page = PageContents(2, vma.begin, 1);
  EXPECT_FALSE(writer->AddTask(2, std::vector{vma}));
  EXPECT_FALSE(writer->AddTask(3, std::vector{vma, vma}));
  EXPECT_FALSE(writer->Write(1, vma.begin, page));
  EXPECT_FALSE(writer->Write(2, vma.end, page));
  EXPECT_FALSE(writer->Write(2, vma.end - Bytes(kPageSize), PageContents(2, vma.begin, 2)));
  EXPECT_FALSE(writer->Write(2, vma.begin, std::span(page).first(100)));
  ASSERT_OK(writer->Write(2, vma.begin + Bytes(kPageSize), page));
  EXPECT_FALSE(writer->Write(2, vma.begin, page));
}

TEST(Layer, EmptyLayerIsALayer) {
  const TemporaryDirectory dir;
  auto writer = LayerWriter::Create(dir.path(), kTestLayerId);
  ASSERT_OK(writer);
  ASSERT_OK(writer->AddTask(1, {}));
  ASSERT_OK(writer->Finish(true));
  auto reader = OpenTestLayer(dir.path());
  ASSERT_OK(reader);
  EXPECT_TRUE(reader->extents().empty());
  ASSERT_OK(reader->LoadHashes());
  ASSERT_OK(reader->VerifyAll());
}

TEST(Layer, IndexWithOneChangedByteIsRefused) {
  const TemporaryDirectory dir;
  const auto info = MakeTestLayer(dir.path());
  ASSERT_OK(info);
  const std::string good = Slurp(IndexPath(dir.path()));
  const size_t hashes_at = 128 + 32 * info->extents.size() + 16 * info->segments.size();
  for (size_t i = 0; i < good.size(); ++i) {
    for (const char flip : {'\x01', '\x80'}) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ flip);
      ASSERT_OK(WriteFile(IndexPath(dir.path()), bad));
      auto reader = OpenTestLayer(dir.path());
      if (i >= hashes_at) {
        ASSERT_OK(reader);  // restore does not read them
        const auto loaded = reader->LoadHashes();
        ASSERT_FALSE(loaded) << "byte " << i;
        EXPECT_EQ(loaded.error().kind(), ErrorKind::kUser);
      } else {
        ASSERT_FALSE(reader) << "byte " << i;
        EXPECT_EQ(reader.error().kind(), ErrorKind::kUser);
        EXPECT_NE(reader.error().message().find(IndexPath(dir.path())), std::string::npos);
      }
    }
  }
}

TEST(Layer, TruncatedLayerIsRefused) {
  const TemporaryDirectory dir;
  ASSERT_OK(MakeTestLayer(dir.path()));
  const auto size = Stat(PagesPath(dir.path()))->st_size;
  for (const off_t length : {off_t{0}, off_t{4096}, size - 1, size + 1}) {
    ASSERT_EQ(::truncate(PagesPath(dir.path()).c_str(), length), 0);
    const auto reader = OpenTestLayer(dir.path());
    ASSERT_FALSE(reader);
    EXPECT_EQ(reader.error().kind(), ErrorKind::kUser);
    EXPECT_NE(reader.error().message().find(fmt::format("ends at offset {}", length)),
              std::string::npos)
        << reader.error().message();
  }
}

TEST(Layer, TruncatedIndexIsRefused) {
  const TemporaryDirectory dir;
  ASSERT_OK(MakeTestLayer(dir.path()));
  const std::string good = Slurp(IndexPath(dir.path()));
  for (size_t length = 0; length < good.size(); ++length) {
    ASSERT_OK(WriteFile(IndexPath(dir.path()), good.substr(0, length)));
    ASSERT_FALSE(OpenTestLayer(dir.path())) << length;
  }
  ASSERT_OK(WriteFile(IndexPath(dir.path()), good + "x"));
  ASSERT_FALSE(OpenTestLayer(dir.path()));
}

TEST(Layer, MissingLayerIsRefused) {
  const TemporaryDirectory dir;
  ASSERT_OK(MakeTestLayer(dir.path()));
  ASSERT_OK(RemoveFile(PagesPath(dir.path())));
  const auto reader = OpenTestLayer(dir.path());
  ASSERT_FALSE(reader);
  EXPECT_EQ(reader.error().kind(), ErrorKind::kUser);
  EXPECT_EQ(reader.error().message(),
            PagesPath(dir.path()) + " is missing; the checkpoint is not complete");
}

TEST(Layer, OneChangedByteOfPageDataIsFoundAtItsBlock) {
  const TemporaryDirectory dir;
  const auto info = MakeTestLayer(dir.path());
  ASSERT_OK(info);
  const FileOffset at = info->segments[3].offset + Bytes(5000);
  const Fd fd = OpenFile(PagesPath(dir.path()), O_RDWR).value();
  std::byte byte{};
  ASSERT_OK(ReadExactlyAt(fd.get(), std::span(&byte, 1), at, ""));
  byte ^= std::byte{4};
  ASSERT_OK(WriteExactlyAt(fd.get(), std::span(&byte, 1), at, ""));
  auto reader = OpenTestLayer(dir.path());
  ASSERT_OK(reader);
  ASSERT_OK(reader->LoadHashes());
  const auto verified = reader->VerifyAll();
  ASSERT_FALSE(verified);
  EXPECT_NE(
      verified.error().message().find(fmt::format("offset {} ", AlignDown(at.value, kBlockSize))),
      std::string::npos)
      << verified.error().message();
  EXPECT_FALSE(reader->VerifyBlocks({at, at + Bytes(1)}));
  ASSERT_OK(reader->VerifyBlocks(info->segments[0].file_range()));
}

TEST(Layer, DataInAHoleIsFound) {
  const TemporaryDirectory dir;
  const auto info = MakeTestLayer(dir.path());
  ASSERT_OK(info);
  const Fd fd = OpenFile(PagesPath(dir.path()), O_RDWR).value();
  const std::byte byte{1};
  ASSERT_OK(WriteExactlyAt(fd.get(), std::span(&byte, 1),
                           info->extents[1].file_range().end + Bytes(100'000), ""));
  auto reader = OpenTestLayer(dir.path());
  ASSERT_OK(reader);
  ASSERT_OK(reader->LoadHashes());
  EXPECT_FALSE(reader->VerifyAll());
}

TEST(Layer, IndexOfAnotherVersionIsNamedSo) {
  const TemporaryDirectory dir;
  ASSERT_OK(MakeTestLayer(dir.path()));
  std::string index = Slurp(IndexPath(dir.path()));
  index[8] = 7;
  ASSERT_OK(WriteFile(IndexPath(dir.path()), index));
  const auto reader = OpenTestLayer(dir.path());
  ASSERT_FALSE(reader);
  EXPECT_NE(reader.error().message().find("format version 7 is not one this unmoor (1) reads"),
            std::string::npos);
}

TEST(Layer, LayerOfAnotherCheckpointIsRefused) {
  const TemporaryDirectory dir;
  const auto info = MakeTestLayer(LayersDirectory(dir.path()));
  ASSERT_OK(info);
  ManifestLayer entry = MakeTestManifest(*info).layers[0];
  ASSERT_OK(LayerReader::Open(dir.path(), entry));
  entry.index_checksum ^= 1;
  EXPECT_FALSE(LayerReader::Open(dir.path(), entry));
}

// A file-size limit stands for the full disk: writing fails in the middle.
TEST(Layer, FailedWriteIsReportedAndNothingHangs) {
  const TemporaryDirectory dir;
  struct rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  ::signal(SIGXFSZ, SIG_IGN);
  const VaddrRange vma = Pages(0x7f0000000000, 16384);
  auto writer = LayerWriter::Create(dir.path(), kTestLayerId);
  ASSERT_OK(writer);
  ASSERT_OK(writer->AddTask(1, std::vector{vma}));
  const struct rlimit low{size_t{8} << 20, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &low), 0);
  const auto pages = PageContents(1, vma.begin, 16384);
  const auto written = writer->Write(1, vma.begin, pages);
  const auto finished = writer->Finish(true);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  ASSERT_FALSE(finished);
  EXPECT_EQ(finished.error().errnum(), EFBIG);
  EXPECT_EQ(finished.error().kind(), ErrorKind::kMachine);
  EXPECT_NE(finished.error().message().find(PagesPath(dir.path())), std::string::npos);
  if (!written) {
    EXPECT_EQ(written.error().message(), finished.error().message());
  }
}

TEST(Layer, AbandonedWriterLeavesNoThread) {
  const TemporaryDirectory dir;
  const size_t before = ListDirectory("/proc/self/task")->size();
  {
    auto writer = LayerWriter::Create(dir.path(), kTestLayerId);
    ASSERT_OK(writer);
    const VaddrRange vma = Pages(0x7f0000000000, 4096);
    ASSERT_OK(writer->AddTask(1, std::vector{vma}));
    ASSERT_OK(writer->Write(1, vma.begin, PageContents(1, vma.begin, 4096)));
  }
  EXPECT_EQ(ListDirectory("/proc/self/task")->size(), before);
}

TEST(Layer, DISABLED_ChildWritesLayer) {
  const auto info = MakeTestLayer(std::getenv("UNMOOR_TEST_DIR"));
  ASSERT_FALSE(info);
  EXPECT_NE(info.error().message().find("fault injected"), std::string::npos);
}

TEST(Layer, EveryFaultPointOfTheWriterFailsTheLayer) {
  for (const std::string point : {"layer.write", "layer.before_sync"}) {
    const TemporaryDirectory dir;
    EXPECT_EQ(RunHiddenTest("Layer.DISABLED_ChildWritesLayer", point + ":error", dir.path()), 0)
        << point;
    EXPECT_FALSE(OpenTestLayer(dir.path())) << point;
  }
}

}  // namespace
}  // namespace unmoor
