// VerifyLayer: every damage is found, all of them, and told with the addresses it concerns.
#include "image/verify.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include "image_fixture.h"

namespace unmoor {
namespace {

class Verify : public ::testing::Test {
 protected:
  void SetUp() override {
    auto info = MakeTestLayer(LayersDirectory(directory_.path()));
    ASSERT_OK(info);
    info_ = *info;
    manifest_ = MakeTestManifest(info_);
  }
  LayerVerdict Check() {
    return VerifyLayer(directory_.path(), kTestLayerId, &manifest_.layers[0], {});
  }
  std::string Pages() { return LayerPagesPath(directory_.path(), kTestLayerId); }
  std::string Index() { return LayerIndexPath(directory_.path(), kTestLayerId); }
  static void Flip(const std::string& path, uint64_t offset) {
    const Fd fd = OpenFile(path, O_RDWR).value();
    std::byte byte{};
    ASSERT_OK(ReadExactlyAt(fd.get(), {&byte, 1}, FileOffset(offset), path));
    byte ^= std::byte{0x10};
    ASSERT_OK(WriteExactlyAt(fd.get(), {&byte, 1}, FileOffset(offset), path));
  }
  static void Resize(const std::string& path, uint64_t size) {
    const Fd fd = OpenFile(path, O_RDWR).value();
    ASSERT_OK(Truncate(fd.get(), Bytes(size), path));
  }

  TemporaryDirectory directory_;
  LayerInfo info_;
  Manifest manifest_;
};

TEST_F(Verify, ASoundLayerHasNoDamage) {
  const LayerVerdict verdict = Check();
  EXPECT_TRUE(verdict.damages.empty());
  EXPECT_TRUE(verdict.index.has_value());
  EXPECT_GE(verdict.checked, info_.data_bytes);
}

TEST_F(Verify, AllFlippedBytesAreFoundWithTheirAddresses) {
  std::vector<uint64_t> places;
  for (const Segment& segment : info_.segments) {
    places.push_back(segment.offset.value);
    places.push_back(segment.file_range().end.value - 1);
  }
  for (const uint64_t place : places) Flip(Pages(), place);
  const LayerVerdict verdict = Check();
  for (const uint64_t place : places) {
    const auto damage = std::ranges::find_if(verdict.damages, [&](const Damage& d) {
      return d.bytes && d.bytes->Contains(FileOffset(place));
    });
    ASSERT_NE(damage, verdict.damages.end()) << "byte " << place;
    bool named = false;
    for (const DamagePlace& at : PlacesOf(*damage->bytes, *verdict.index, 0, &manifest_)) {
      const auto extent = std::ranges::find_if(info_.extents, [&](const Extent& e) {
        return e.file_range().Contains(FileOffset(place));
      });
      ASSERT_NE(extent, info_.extents.end());
      const Vaddr address = extent->range.begin + (FileOffset(place) - extent->offset);
      named |= at.task_vpid == extent->task_vpid && at.addresses.Contains(address) &&
               at.vma == extent->range && at.vma_name == "[anon:x]" && !at.task.empty();
    }
    EXPECT_TRUE(named) << "byte " << place;
  }
}

TEST_F(Verify, DataInAHoleIsFound) {
  Flip(Pages(), info_.file_size.value - 1);
  Flip(Pages(), info_.extents[0].file_range().end.value + kBlockSize);
  const LayerVerdict verdict = Check();
  EXPECT_EQ(verdict.damages.size(), 2u);
  EXPECT_TRUE(verdict.pages_unsound);
  EXPECT_TRUE(verdict.damaged_blocks.empty());
}

TEST_F(Verify, AWrongSizeIsFoundAndTheRestStillChecked) {
  Flip(Pages(), info_.segments.front().offset.value);
  Resize(Pages(), info_.segments.back().offset.value);
  LayerVerdict verdict = Check();
  ASSERT_EQ(verdict.damages.size(), 2u);
  EXPECT_NE(verdict.damages[0].what.find("truncated"), std::string::npos);
  EXPECT_EQ(verdict.damaged_blocks.front(), info_.segments.front().offset.value / kBlockSize);
  EXPECT_EQ(verdict.damaged_blocks.back(),
            (info_.segments.back().file_range().end.value - 1) / kBlockSize);
  Resize(Pages(), info_.file_size.value + 1);
  verdict = Check();
  EXPECT_NE(verdict.damages[0].what.find("too many"), std::string::npos);
}

TEST_F(Verify, AMissingFileIsFound) {
  ASSERT_OK(RemoveFile(Pages()));
  LayerVerdict verdict = Check();
  ASSERT_EQ(verdict.damages.size(), 1u);
  EXPECT_NE(verdict.damages[0].what.find("missing"), std::string::npos);
  EXPECT_EQ(verdict.damaged_blocks.size(), verdict.index->blocks.size());
  ASSERT_OK(RemoveFile(Index()));
  EXPECT_EQ(Check().damages.size(), 2u);
}

TEST_F(Verify, EveryByteOfTheIndexCounts) {
  const uint64_t size = Slurp(Index()).size();
  for (uint64_t at = 0; at < size; ++at) {
    Flip(Index(), at);
    const LayerVerdict verdict = Check();
    ASSERT_EQ(verdict.damages.size(), 1u) << "byte " << at;
    ASSERT_FALSE(verdict.index.has_value()) << "byte " << at;
    Flip(Index(), at);
  }
  ASSERT_TRUE(Check().damages.empty());
  const std::string whole = Slurp(Index());
  for (uint64_t length = 0; length < size; ++length) {
    ASSERT_OK(WriteFile(Index(), std::string_view(whole).substr(0, length)));
    ASSERT_FALSE(Check().index.has_value()) << length << " bytes";
  }
  ASSERT_OK(WriteFile(Index(), whole + "x"));
  ASSERT_FALSE(Check().index.has_value());
}

TEST_F(Verify, AnIndexOfAnotherLayerIsNotBelieved) {
  manifest_.layers[0].index_checksum ^= 1;
  const LayerVerdict verdict = Check();
  ASSERT_EQ(verdict.damages.size(), 1u);
  EXPECT_FALSE(verdict.index.has_value());
}

}  // namespace
}  // namespace unmoor
