// Blocks read ahead are what was checked, and read at all only once.
#include "lazy/verified_blocks.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "image/layer_writer.h"
#include "image/layout.h"
#include "image/pack.h"
#include "image/packed_layer.h"
#include "os/file.h"

namespace unmoor {
namespace {

constexpr const char* kId = "0123456789abcdef0123456789abcdef";
constexpr size_t kBlocks = 4;

void AwaitReadAhead(VerifiedBlocks& source, BlockName block) {
  while (!source.IsReadAhead(block)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

class VerifiedBlocksTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = MakeTemporaryDirectory(::testing::TempDir(), "unmoor-test-").value();
    auto writer = LayerWriter::Create(directory_, kId);
    ASSERT_TRUE(writer);
    const VaddrRange range{Vaddr(0x10000000), Vaddr(0x10000000 + kBlocks * kBlockSize)};
    const std::vector<VaddrRange> vmas = {range};
    ASSERT_TRUE(writer->AddTask(7, vmas));
    std::vector<std::byte> pages(range.size().value);
    for (size_t i = 0; i < pages.size(); ++i) pages[i] = std::byte(1 + i / kBlockSize);
    ASSERT_TRUE(writer->Write(7, range.begin, pages));
    ASSERT_TRUE(writer->Finish(true));
    pages_path_ = directory_ + "/" + kId + ".pages";
    auto layer = LayerReader::Open(pages_path_, directory_ + "/" + kId + ".index");
    ASSERT_TRUE(layer);
    ASSERT_TRUE(layer->LoadHashes());
    begin_ = layer->extents().front().offset;
    layers_.push_back(LayerSource::Plain(*std::move(layer)));
  }
  void TearDown() override { (void)RemoveTree(directory_); }

  [[nodiscard]] FileOffset At(size_t block) const { return begin_ + Bytes(block * kBlockSize); }
  void Damage(size_t block) const {
    const int fd = ::open(pages_path_.c_str(), O_WRONLY);
    const char wrong = 77;
    ASSERT_EQ(::pwrite(fd, &wrong, 1, static_cast<off_t>(At(block).value) + 100), 1);
    ::close(fd);
  }
  static bool Is(const Result<std::span<const std::byte>>& block, size_t number) {
    return block && block->size() == kBlockSize &&
           std::ranges::all_of(*block, [&](std::byte b) { return b == std::byte(1 + number); });
  }

  std::string directory_;
  std::string pages_path_;
  FileOffset begin_;
  LayerSources layers_;
};

TEST_F(VerifiedBlocksTest, AreCheckedOneByOne) {
  VerifiedBlocks source(layers_);
  Damage(2);
  EXPECT_TRUE(Is(source.Block(0, At(1)), 1));
  const auto damaged = source.Block(0, At(2));
  ASSERT_FALSE(damaged);
  EXPECT_NE(damaged.error().message().find(pages_path_), std::string::npos);
  EXPECT_TRUE(Is(source.Block(0, At(3)), 3));
}

TEST_F(VerifiedBlocksTest, ReadAheadAreWhatWasChecked) {
  VerifiedBlocks source(layers_);
  ASSERT_TRUE(source.StartReaders());
  const std::vector<BlockName> next = {BlockAt(0, At(0)), BlockAt(0, At(1)), BlockAt(0, At(3))};
  source.Expect(next);
  AwaitReadAhead(source, next.back());
  for (size_t block = 0; block < kBlocks; ++block) Damage(block);
  EXPECT_TRUE(Is(source.Block(0, At(0)), 0));
  EXPECT_FALSE(source.Block(0, At(2)));  // not among them
  EXPECT_TRUE(Is(source.Block(0, At(3)), 3));
}

TEST_F(VerifiedBlocksTest, DamagedOnesReadAheadAreToldWhenAskedFor) {
  VerifiedBlocks source(layers_);
  ASSERT_TRUE(source.StartReaders());
  Damage(0);
  const std::vector<BlockName> next = {BlockAt(0, At(0)), BlockAt(0, At(1))};
  source.Expect(next);
  AwaitReadAhead(source, next.back());
  EXPECT_FALSE(source.Block(0, At(0)));
  EXPECT_TRUE(Is(source.Block(0, At(1)), 1));
}

TEST_F(VerifiedBlocksTest, AreForgottenWhenTheReadersStop) {
  VerifiedBlocks source(layers_);
  ASSERT_TRUE(source.StartReaders());
  const std::vector<BlockName> next = {BlockAt(0, At(0))};
  source.Expect(next);
  AwaitReadAhead(source, next.back());
  source.StopReaders();
  EXPECT_FALSE(source.IsReadAhead(next.back()));
  EXPECT_TRUE(Is(source.Block(0, At(1)), 1));
}

TEST_F(VerifiedBlocksTest, AreToldAgainWhenHalfOfThemWereAskedFor) {
  VerifiedBlocks source(layers_);
  EXPECT_TRUE(source.ShouldExpect());
  const std::vector<BlockName> next = {BlockAt(0, At(0)), BlockAt(0, At(1)), BlockAt(0, At(2))};
  source.Expect(next);
  EXPECT_FALSE(source.ShouldExpect());
  EXPECT_TRUE(Is(source.Block(0, At(0)), 0));
  EXPECT_TRUE(Is(source.Block(0, At(0) + Bytes(kPageSize)), 0));
  EXPECT_FALSE(source.ShouldExpect());
  EXPECT_TRUE(Is(source.Block(0, At(1)), 1));
  EXPECT_TRUE(source.ShouldExpect());
}

// Ten frames of a packed layer, more than there are places for.
class PackedBlocksTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kCount = 10;

  void SetUp() override {
    directory_ = MakeTemporaryDirectory(::testing::TempDir(), "unmoor-test-").value();
    auto writer = LayerWriter::Create(LayersDirectory(directory_), kId);
    ASSERT_TRUE(writer);
    const VaddrRange range{Vaddr(kHugePageSize), Vaddr((kCount + 1) * kHugePageSize)};
    const std::vector<VaddrRange> vmas = {range};
    ASSERT_TRUE(writer->AddTask(7, vmas));
    std::vector<std::byte> pages(range.size().value);
    for (size_t i = 0; i < pages.size(); ++i) pages[i] = ByteAt(i);
    ASSERT_TRUE(writer->Write(7, range.begin, pages));
    const auto info = writer->Finish(true);
    ASSERT_TRUE(info);
    begin_ = info->extents.front().offset;
    entry_ = {kId, info->file_size, info->data_bytes, info->allocated, info->index_checksum};
    ASSERT_TRUE(PackLayerIn(directory_, entry_, {}, {}));
    Open();
  }
  void TearDown() override { (void)RemoveTree(directory_); }

  void Open() {
    layers_.clear();
    auto layer = LayerSource::Open(directory_, entry_);
    ASSERT_TRUE(layer) << layer.error().message();
    layers_.push_back(*std::move(layer));
  }
  // Tells frame and block.
  static std::byte ByteAt(size_t at) { return std::byte(1 + at / kBlockSize % 251); }
  [[nodiscard]] FileOffset At(uint64_t frame, uint64_t block) const {
    return begin_ + Bytes(frame * kHugePageSize + block * kBlockSize);
  }
  static bool Is(const Result<std::span<const std::byte>>& block, uint64_t frame, uint64_t number) {
    const std::byte byte = ByteAt(frame * kHugePageSize + number * kBlockSize);
    return block && block->size() == kBlockSize &&
           std::ranges::all_of(*block, [&](std::byte b) { return b == byte; });
  }
  // A byte in the middle of the stored frame.
  void Damage(uint64_t frame) const {
    const std::string path = LayerPackedPath(directory_, kId);
    const auto packed = PackedReader::Open(path, LayerIndexPath(directory_, kId), &entry_);
    ASSERT_TRUE(packed);
    const FileRange range = packed->FileRangeOf(frame);
    const int fd = ::open(path.c_str(), O_RDWR);
    const auto at = static_cast<off_t>((range.begin.value + range.end.value) / 2);
    char byte = 0;
    ASSERT_EQ(::pread(fd, &byte, 1, at), 1);
    byte = static_cast<char>(byte ^ 1);
    ASSERT_EQ(::pwrite(fd, &byte, 1, at), 1);
    ::close(fd);
  }

  std::string directory_;
  ManifestLayer entry_;
  FileOffset begin_;
  LayerSources layers_;
};

TEST_F(PackedBlocksTest, ComeOutOfTheirFrames) {
  VerifiedBlocks source(layers_);
  for (const uint64_t frame : {0, 9, 4, 0, 1, 2, 3, 5, 6, 7, 8, 0}) {
    for (const uint64_t block : {0, 31, 7}) {
      EXPECT_TRUE(Is(source.Block(0, At(frame, block)), frame, block)) << frame << " " << block;
    }
  }
}

TEST_F(PackedBlocksTest, AFrameIsReadOnceForAllOfItsBlocks) {
  VerifiedBlocks source(layers_);
  EXPECT_TRUE(Is(source.Block(0, At(3, 0)), 3, 0));
  Damage(3);
  EXPECT_TRUE(source.IsReadAhead(BlockAt(0, At(3, 31))));
  EXPECT_TRUE(Is(source.Block(0, At(3, 31)), 3, 31));
}

TEST_F(PackedBlocksTest, TheOneAskedForLeastRecentlyGivesWay) {
  VerifiedBlocks source(layers_);
  for (uint64_t frame = 0; frame < VerifiedBlocks::kFrames; ++frame) {
    EXPECT_TRUE(Is(source.Block(0, At(frame, 0)), frame, 0));
  }
  EXPECT_TRUE(Is(source.Block(0, At(0, 1)), 0, 1));
  EXPECT_TRUE(Is(source.Block(0, At(9, 0)), 9, 0));
  EXPECT_TRUE(source.IsReadAhead(BlockAt(0, At(0, 0))));
  EXPECT_FALSE(source.IsReadAhead(BlockAt(0, At(1, 0))));
}

TEST_F(PackedBlocksTest, FramesAreReadAheadAndTheirBlocksAreComingMeanwhile) {
  VerifiedBlocks source(layers_);
  std::vector<BlockName> next;
  for (uint64_t block = 0; block < 64; ++block) next.push_back(BlockAt(0, At(4, block)));
  EXPECT_FALSE(source.IsComing(next.back()));
  ASSERT_TRUE(source.StartReaders());
  source.Expect(next);
  while (source.IsComing(next.back())) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  // Two frames, read side by side.
  AwaitReadAhead(source, next.front());
  AwaitReadAhead(source, next.back());
  EXPECT_FALSE(source.IsComing(next.back()));
  EXPECT_FALSE(source.IsReadAhead(BlockAt(0, At(6, 0))));
  Damage(5);
  EXPECT_TRUE(Is(source.Block(0, At(5, 31)), 5, 31));
}

TEST_F(PackedBlocksTest, ADamagedFrameIsToldWithFileAndOffsetAndTheOthersCome) {
  VerifiedBlocks source(layers_);
  ASSERT_TRUE(source.StartReaders());
  Damage(2);
  const std::vector<BlockName> next = {BlockAt(0, At(2, 0)), BlockAt(0, At(3, 0))};
  source.Expect(next);
  AwaitReadAhead(source, next.back());
  const auto damaged = source.Block(0, At(2, 5));
  ASSERT_FALSE(damaged);
  EXPECT_NE(damaged.error().message().find(LayerPackedPath(directory_, kId) + " is damaged: "),
            std::string::npos);
  EXPECT_NE(damaged.error().message().find("at offset "), std::string::npos);
  EXPECT_TRUE(Is(source.Block(0, At(3, 5)), 3, 5));
}

TEST_F(PackedBlocksTest, OfALayerCutShortTheFirstOnesCome) {
  VerifiedBlocks source(layers_);
  const std::string path = LayerPackedPath(directory_, kId);
  const auto packed = PackedReader::Open(path, LayerIndexPath(directory_, kId), &entry_);
  ASSERT_TRUE(packed);
  ASSERT_EQ(::truncate(path.c_str(), static_cast<off_t>(packed->FileRangeOf(5).begin.value) + 40),
            0);
  EXPECT_TRUE(Is(source.Block(0, At(4, 0)), 4, 0));
  const auto missing = source.Block(0, At(5, 0));
  ASSERT_FALSE(missing);
  EXPECT_NE(missing.error().message().find(path), std::string::npos);
}

}  // namespace
}  // namespace unmoor
