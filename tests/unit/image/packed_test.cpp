// Packed layers and directories: what comes out is what went in; no damage, no full disk and no
// kill at any moment leaves less than one whole image.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <random>

#include "base/zero.h"
#include "image/pack.h"
#include "image/packed_layer.h"
#include "image/publisher.h"
#include "image_fixture.h"

namespace unmoor {
namespace {

constexpr Compression kLz4{Codec::kLz4, 0};
constexpr Compression kZstd{Codec::kZstd, 1};

std::string Contents(const std::string& path) {
  const Fd fd = OpenFile(path, O_RDONLY).value();
  std::string text(static_cast<size_t>(StatFd(fd.get(), path).value().st_size), 0);
  (void)ReadExactlyAt(fd.get(), std::as_writable_bytes(std::span(text)), FileOffset(0), path);
  return text;
}

// Of a sparse file: its size, and each page that is not zeros, with its offset.
std::string PagesOf(const std::string& path) {
  const Fd fd = OpenFile(path, O_RDONLY).value();
  const auto size = static_cast<uint64_t>(StatFd(fd.get(), path).value().st_size);
  std::string text = fmt::format("{} bytes\n", size);
  std::vector<std::byte> page(kPageSize);
  const FileRange all{FileOffset(0), FileOffset(size)};
  const std::vector<FileRange> ranges = DataRanges(fd.get(), all, path).value();
  for (const FileRange& range : ranges) {
    for (FileOffset at = range.begin; at < range.end; at = at + Bytes(kPageSize)) {
      EXPECT_TRUE(ReadExactlyAt(fd.get(), page, at, path));
      if (IsZero(page)) continue;
      text += fmt::format("{:x}:", at.value);
      text.append(reinterpret_cast<const char*>(page.data()), page.size());  // SAFETY: as chars
    }
  }
  return text;
}

void Put(const std::string& path, std::string_view bytes) {
  (void)RemoveFile(path);
  ASSERT_OK(WriteFile(path, bytes));
}

// A layer with frames of every kind: full, sparse, incompressible, and pages of zeros inside
// segments.
Result<LayerInfo> MakeLayer(const std::string& directory, const std::string& id, ZeroPages zeros) {
  UNMOOR_ASSIGN(LayerWriter writer, LayerWriter::Create(directory, id, WriteBack::kLater, zeros));
  const std::vector<VaddrRange> vmas = {Pages(0x7f0000123000, 40), Pages(0x7f0000800000, 1200)};
  std::mt19937_64 random(4711);
  for (const uint32_t task : {7u, 8u}) {
    UNMOOR_TRY(writer.AddTask(task, vmas));
    for (uint64_t page = 0; page < 40; page += 3) {
      const Vaddr at = vmas[0].begin + Bytes(page * kPageSize);
      UNMOOR_TRY(writer.Write(task, at, PageContents(task, at, 1)));
    }
    auto pages = PageContents(task, vmas[1].begin, task == 7 ? 1060 : 60);
    std::fill_n(pages.begin() + 10 * kPageSize, 30 * kPageSize, std::byte{0});
    // One whole frame that does not compress.
    for (size_t i = 512 * kPageSize; i < std::min(pages.size(), 1024 * kPageSize); ++i) {
      pages[i] = static_cast<std::byte>(random());
    }
    UNMOOR_TRY(writer.Write(task, vmas[1].begin, pages));
  }
  return writer.Finish(true);
}

class Packed : public ::testing::Test {
 protected:
  void SetUp() override { MakeImage(image(), ZeroPages::kHole); }

  void MakeImage(const std::string& directory, ZeroPages zeros) {
    ASSERT_OK(MakeDirectory(directory));
    auto info = MakeLayer(LayersDirectory(directory), kTestLayerId, zeros);
    ASSERT_OK(info);
    info_ = *info;
    ASSERT_OK(MakeDirectory(CriuDirectory(directory)));
    ASSERT_OK(WriteFile(CriuDirectory(directory) + "/inventory.img", "x"));
    ASSERT_OK(WriteManifest(directory, MakeTestManifest(info_)));
  }
  [[nodiscard]] std::string image() const { return directory_.path() + "/image"; }
  [[nodiscard]] std::string Packed_() const { return LayerPackedPath(image(), kTestLayerId); }
  [[nodiscard]] std::string Pages_() const { return LayerPagesPath(image(), kTestLayerId); }
  [[nodiscard]] std::string Index_() const { return LayerIndexPath(image(), kTestLayerId); }
  // All is there, in one form or in the other; and nothing else but leftovers of our own making.
  void ExpectWhole(const std::string& pages) {
    const auto manifest = ReadManifest(image());
    ASSERT_OK(manifest);
    if (IsPacked(image(), *manifest)) {
      const LayerVerdict verdict =
          VerifyPackedLayer(image(), kTestLayerId, &manifest->layers[0], true, {});
      EXPECT_TRUE(verdict.damages.empty()) << verdict.damages[0].what;
    } else {
      EXPECT_TRUE(PagesOf(Pages_()) == pages);
    }
    EXPECT_EQ(Slurp(CriuDirectory(image()) + "/inventory.img"), "x");
  }
  void ExpectAlone() {
    EXPECT_EQ(ListDirectory(directory_.path()).value(), std::vector<std::string>{"image"});
  }

  TemporaryDirectory directory_;
  LayerInfo info_;
};

TEST_F(Packed, UnpackingGivesTheSameFileWithTheSameHoles) {
  for (const ZeroPages zeros : {ZeroPages::kHole, ZeroPages::kKeep}) {
    for (const Compression& compression : {kLz4, Compression{Codec::kLz4, 4}, kZstd}) {
      ASSERT_OK(RemoveTree(image()));
      MakeImage(image(), zeros);
      const std::string pages = PagesOf(Pages_());
      const auto blocks = Stat(Pages_()).value().st_blocks;
      const std::string manifest = Slurp(ManifestPath(image()));
      const auto packed = PackDirectory(image(), std::nullopt, compression, {});
      ASSERT_OK(packed);
      EXPECT_EQ(packed->pages, info_.data_bytes);
      EXPECT_LT(packed->packed, packed->pages);
      EXPECT_FALSE(Exists(Pages_()));
      EXPECT_EQ(Slurp(ManifestPath(image())), manifest);
      ASSERT_OK(UnpackDirectory(image(), std::nullopt, {}));
      EXPECT_FALSE(Exists(Packed_()));
      EXPECT_TRUE(PagesOf(Pages_()) == pages);
      EXPECT_LE(Stat(Pages_()).value().st_blocks, blocks + 64);
      const auto reader = LayerReader::Open(image(), ReadManifest(image())->layers[0]);
      ASSERT_OK(reader);
      ExpectAlone();
    }
  }
}

TEST_F(Packed, TheFileIsTheSameWhateverTheThreads) {
  std::string first;
  for (const unsigned threads : {1u, 2u, 7u}) {
    const std::string path = directory_.path() + "/packed";
    ASSERT_OK(PackLayer(Pages_(), Index_(), path, kLz4, {threads, {}}));
    if (first.empty()) first = Contents(path);
    EXPECT_TRUE(Contents(path) == first);
    ASSERT_OK(RemoveFile(path));
  }
}

TEST_F(Packed, AnotherDirectoryGetsItAndTheFirstStays) {
  const std::string pages = PagesOf(Pages_());
  const std::string out = directory_.path() + "/out";
  const std::string back = directory_.path() + "/back";
  ASSERT_OK(PackDirectory(image(), out, kZstd, {}));
  EXPECT_TRUE(Exists(Pages_()));
  EXPECT_FALSE(Exists(LayerPagesPath(out, kTestLayerId)));
  EXPECT_FALSE(PackDirectory(out, std::nullopt, kLz4, {}));
  EXPECT_FALSE(UnpackDirectory(image(), std::nullopt, {}));
  ASSERT_OK(UnpackDirectory(out, back, {}));
  EXPECT_TRUE(PagesOf(LayerPagesPath(back, kTestLayerId)) == pages);
  // Over an image that is there, either way.
  ASSERT_OK(UnpackDirectory(out, image(), {}));
  ASSERT_OK(PackDirectory(back, out, kLz4, {}));
  ASSERT_OK(PackDirectory(image(), back, kLz4, {}));
  EXPECT_TRUE(IsPacked(back, *ReadManifest(back)));
}

TEST_F(Packed, WhatIsPackedIsRefusedByNameWhereItCannotBeMapped) {
  ASSERT_OK(PackDirectory(image(), std::nullopt, kLz4, {}));
  const auto opened = LayerReader::Open(image(), ReadManifest(image())->layers[0]);
  ASSERT_FALSE(opened);
  EXPECT_NE(opened.error().message().find("unmoor unpack " + image()), std::string::npos)
      << opened.error().message();
}

TEST_F(Packed, ADamagedImageIsNotPacked) {
  const Fd fd = OpenFile(Pages_(), O_RDWR).value();
  ASSERT_OK(WriteExactlyAt(fd.get(), std::as_bytes(std::span("y", 1)),
                           info_.segments.back().offset + Bytes(5), Pages_()));
  const auto packed = PackDirectory(image(), std::nullopt, kLz4, {});
  ASSERT_FALSE(packed);
  EXPECT_NE(packed.error().message().find("damaged"), std::string::npos);
  EXPECT_TRUE(Exists(Pages_()));
  ExpectAlone();
}

// What a reader makes of the changed file: refused at opening, or at a frame.
bool IsRefused(const std::string& path, const std::string& index) {
  const auto packed = PackedReader::Open(path, index, nullptr);
  if (!packed) return true;
  std::vector<std::byte> buffer;
  std::vector<std::byte> content;
  Decompressor decompressor;
  for (size_t i = 0; i < packed->plan().frames.size(); ++i) {
    const auto stored = packed->ReadStored(i, buffer);
    content.resize(packed->plan().frames[i].content);
    if (!stored || !packed->Expand(i, *stored, decompressor, content)) return true;
  }
  return false;
}

TEST_F(Packed, EveryFlippedByteAndEveryTruncationIsRefused) {
  ASSERT_OK(PackDirectory(image(), std::nullopt, kLz4, {}));
  const std::string whole = Contents(Packed_());
  ASSERT_FALSE(IsRefused(Packed_(), Index_()));
  const size_t frames = PackedReader::Open(Packed_(), Index_(), nullptr)->plan().frames.size();
  const size_t tail = frames * packed_format::kHeadSize + packed_format::kTrailerSize;
  // Header, first head, table and trailer byte by byte; the frames between sampled.
  std::vector<size_t> places;
  for (size_t i = 0; i < packed_format::kHeaderSize + packed_format::kHeadSize; ++i) {
    places.push_back(i);
  }
  for (size_t i = whole.size() - tail; i < whole.size(); ++i) places.push_back(i);
  std::mt19937_64 random(7);
  for (int i = 0; i < 60; ++i) places.push_back(random() % whole.size());
  const Fd fd = OpenFile(Packed_(), O_RDWR).value();
  for (const size_t place : places) {
    const char flipped = static_cast<char>(whole[place] ^ (1 << (place % 8)));
    ASSERT_OK(WriteExactlyAt(fd.get(), std::as_bytes(std::span(&flipped, 1)), FileOffset(place),
                             Packed_()));
    EXPECT_TRUE(IsRefused(Packed_(), Index_())) << "byte " << place;
    if (place % 8 == 0) {
      const LayerVerdict verdict = VerifyPackedLayer(image(), kTestLayerId, nullptr, false, {});
      EXPECT_FALSE(verdict.damages.empty()) << "byte " << place;
    }
    ASSERT_OK(WriteExactlyAt(fd.get(), std::as_bytes(std::span(&whole[place], 1)),
                             FileOffset(place), Packed_()));
  }
  const size_t step = std::max<size_t>(1, whole.size() / 150);
  for (size_t size = whole.size() - 1; size > 0; size -= size > 200 + step ? step : 1) {
    ASSERT_OK(Truncate(fd.get(), Bytes(size), Packed_()));
    EXPECT_TRUE(IsRefused(Packed_(), Index_())) << "truncated to " << size;
  }
  Put(Packed_(), whole + "z");
  EXPECT_TRUE(IsRefused(Packed_(), Index_()));
}

// With every checksum made right again: what the hashes of the index are for.
TEST_F(Packed, AFrameWithOtherContentsIsNotUnpackedThoughItsChecksumIsRight) {
  const std::string other = directory_.path() + "/other";
  ASSERT_OK(PackDirectory(image(), std::nullopt, kLz4, {}));
  const auto packed = PackedReader::Open(Packed_(), Index_(), nullptr);
  ASSERT_OK(packed);
  std::vector<std::byte> buffer;
  std::vector<packed_format::FrameHead> heads;
  for (size_t i = 0; i < packed->plan().frames.size(); ++i) heads.push_back(packed->head(i));
  std::string forged = Contents(Packed_());
  // The incompressible frame is stored as it is.
  const auto raw = std::ranges::find_if(
      heads, [](const packed_format::FrameHead& head) { return head.stored == head.content; });
  ASSERT_NE(raw, heads.end());
  forged[raw->place + packed_format::kHeadSize + 77] ^= 1;
  const auto bytes = std::as_bytes(std::span(forged));
  raw->checksum =
      index_format::Checksum(bytes.subspan(raw->place + packed_format::kHeadSize, raw->stored));
  const auto head = packed_format::EncodeHeads({&*raw, 1});
  std::memcpy(&forged[raw->place], head.data(), head.size());
  const auto table = packed_format::EncodeHeads(heads);
  const size_t place = forged.size() - table.size() - packed_format::kTrailerSize;
  std::memcpy(&forged[place], table.data(), table.size());
  const auto trailer = packed_format::EncodeTrailer(table, place);
  std::memcpy(&forged[place + table.size()], trailer.data(), trailer.size());
  Put(Packed_(), forged);
  const auto unpacked = UnpackDirectory(image(), std::nullopt, {});
  ASSERT_FALSE(unpacked);
  EXPECT_NE(unpacked.error().message().find("hash"), std::string::npos)
      << unpacked.error().message();
  EXPECT_TRUE(Exists(Packed_()));
  const auto quick = VerifyPackedLayer(image(), kTestLayerId, nullptr, false, {});
  const auto deep = VerifyPackedLayer(image(), kTestLayerId, nullptr, true, {});
  EXPECT_TRUE(quick.damages.empty());
  ASSERT_EQ(deep.damages.size(), 1u);
  EXPECT_TRUE(deep.damages[0].pages->Contains(FileOffset(raw->piece * kHugePageSize)));
}

TEST_F(Packed, ARestoreUnpacksBesideTheImageAndUsesItAgain) {
  const std::string pages = PagesOf(Pages_());
  ASSERT_FALSE(UnpackForRestore(image(), {})->has_value());
  ASSERT_OK(PackDirectory(image(), std::nullopt, kLz4, {}));
  const auto first = UnpackForRestore(image(), {});
  ASSERT_OK(first);
  ASSERT_TRUE(first->has_value());
  EXPECT_FALSE((*first)->reused);
  EXPECT_TRUE(PagesOf(LayerPagesPath((*first)->directory, kTestLayerId)) == pages);
  EXPECT_TRUE(Exists(Packed_()));
  EXPECT_TRUE((*UnpackForRestore(image(), {}))->reused);
  // One of another boot, or of an image that was here before, is not used.
  const std::string older = directory_.path() + "/.image.unpacked-0badb007";
  ASSERT_OK(Rename((*first)->directory, older));
  EXPECT_FALSE((*UnpackForRestore(image(), {}))->reused);
  EXPECT_FALSE(Exists(older));
  const std::string other = ManifestPath((*first)->directory);
  Manifest changed = MakeTestManifest(info_);
  changed.checkpoint_id[0] = 'f';
  ASSERT_OK(RemoveFile(other));
  ASSERT_OK(WriteManifest((*first)->directory, changed));
  EXPECT_FALSE((*UnpackForRestore(image(), {}))->reused);
  EXPECT_EQ(Slurp(other), Slurp(ManifestPath(image())));
}

TEST_F(Packed, WithoutIoUringItIsTheSame) {
  const std::string pages = PagesOf(Pages_());
  ASSERT_OK(PackDirectory(image(), std::nullopt, kLz4, {}));
  ASSERT_EQ(::setenv("UNMOOR_NO_IO_URING", "1", 1), 0);
  const auto unpacked = UnpackDirectory(image(), std::nullopt, {});
  ::unsetenv("UNMOOR_NO_IO_URING");
  ASSERT_OK(unpacked);
  EXPECT_TRUE(PagesOf(Pages_()) == pages);
}

TEST(CompressionWords, AreReadAndRefused) {
  EXPECT_EQ(ToString(*ParseCompression("lz4")), "lz4");
  EXPECT_EQ(ToString(*ParseCompression("lz4:9")), "lz4:9");
  EXPECT_EQ(ToString(*ParseCompression("zstd")), "zstd:3");
  EXPECT_EQ(ToString(*ParseCompression("zstd:1")), "zstd:1");
  for (const char* wrong :
       {"", "gzip", "lz4:", "lz4:13", "zstd:0", "zstd:20", "zstd:3x", "lz4:-1"}) {
    EXPECT_FALSE(ParseCompression(wrong)) << wrong;
  }
}

// Run by the tests below in a process of its own, in UNMOOR_TEST_DIR.
TEST(DISABLED_PackedFaults, Pack) {
  ASSERT_OK(PackDirectory(std::string(std::getenv("UNMOOR_TEST_DIR")) + "/image", std::nullopt,
                          kLz4, {}));
}
TEST(DISABLED_PackedFaults, Unpack) {
  ASSERT_OK(
      UnpackDirectory(std::string(std::getenv("UNMOOR_TEST_DIR")) + "/image", std::nullopt, {}));
}
TEST(DISABLED_PackedFaults, Cache) {
  ASSERT_OK(UnpackForRestore(std::string(std::getenv("UNMOOR_TEST_DIR")) + "/image", {}));
}

TEST_F(Packed, KilledOrFailedAtAnyPointOneWholeImageIsLeft) {
  const std::vector<std::string> publishing = {"publish.before_sync", "publish.before_rename",
                                               "publish.after_rename"};
  const std::string pages = PagesOf(Pages_());
  const auto try_all = [&](const char* test, std::vector<std::string> points, bool packed) {
    points.insert(points.end(), publishing.begin(), publishing.end());
    for (const std::string& point : points) {
      for (const char* action : {":kill", ":error"}) {
        SCOPED_TRACE(test + (" " + point) + action);
        const int status = RunHiddenTest("DISABLED_PackedFaults." + std::string(test),
                                         point + action, directory_.path());
        ASSERT_NE(status, 0) << "the fault point was not passed";
        ASSERT_EQ(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
                  action == std::string(":kill"));
        ExpectWhole(pages);
        // The next command removes what was left, and does what it has to.
        if (IsPacked(image(), *ReadManifest(image()))) {
          ASSERT_OK(UnpackDirectory(image(), std::nullopt, {}));
        } else {
          ASSERT_OK(PackDirectory(image(), std::nullopt, kLz4, {}));
        }
        ExpectAlone();
        const bool now = IsPacked(image(), *ReadManifest(image()));
        if (now && !packed) ASSERT_OK(UnpackDirectory(image(), std::nullopt, {}));
        if (!now && packed) ASSERT_OK(PackDirectory(image(), std::nullopt, kLz4, {}));
      }
    }
  };
  try_all("Pack", {"pack.frame", "pack.frame", "pack.table", "pack.before_publish"}, false);
  ASSERT_OK(PackDirectory(image(), std::nullopt, kLz4, {}));
  try_all("Unpack", {"unpack.frame", "unpack.end", "unpack.before_publish"}, true);
}

TEST_F(Packed, KilledWhileUnpackingForARestoreTheImageIsUntouched) {
  ASSERT_OK(PackDirectory(image(), std::nullopt, kLz4, {}));
  const std::string packed = Contents(Packed_());
  for (const char* point :
       {"unpack.frame", "cache.before_publish", "publish.before_rename", "publish.after_rename"}) {
    SCOPED_TRACE(point);
    const int status = RunHiddenTest("DISABLED_PackedFaults.Cache", std::string(point) + ":kill",
                                     directory_.path());
    ASSERT_TRUE(WIFSIGNALED(status));
    EXPECT_TRUE(Contents(Packed_()) == packed);
    const auto cache = UnpackForRestore(image(), {});
    ASSERT_OK(cache);
    EXPECT_EQ(ListDirectory(directory_.path())->size(), 2u) << "a partial directory is left";
    ASSERT_OK(RemoveTree((*cache)->directory));
  }
}

}  // namespace
}  // namespace unmoor
