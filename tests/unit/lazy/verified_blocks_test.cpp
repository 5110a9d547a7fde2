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
#include "os/file.h"

namespace unmoor {
namespace {

constexpr const char* kId = "0123456789abcdef0123456789abcdef";
constexpr size_t kBlocks = 4;

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
    layers_.push_back(*std::move(layer));
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
  std::vector<LayerReader> layers_;
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
  while (!source.IsReadAhead(next.back())) std::this_thread::sleep_for(std::chrono::milliseconds(1));
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
  while (!source.IsReadAhead(next.back())) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_FALSE(source.Block(0, At(0)));
  EXPECT_TRUE(Is(source.Block(0, At(1)), 1));
}

TEST_F(VerifiedBlocksTest, ForgetsWhatIsNotExpectedAnyMore) {
  VerifiedBlocks source(layers_);
  ASSERT_TRUE(source.StartReaders());
  const std::vector<BlockName> first = {BlockAt(0, At(0))};
  const std::vector<BlockName> second = {BlockAt(0, At(1))};
  source.Expect(first);
  while (!source.IsReadAhead(first.back())) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  source.Expect(second);
  EXPECT_FALSE(source.IsReadAhead(first.back()));
  source.StopReaders();
  EXPECT_TRUE(Is(source.Block(0, At(1)), 1));
}

}  // namespace
}  // namespace unmoor
