// Checkpoints: full ones, deltas, chains of deltas; each complete without the ones before.
#include <sys/mount.h>
#include <unistd.h>

#include <random>

#include "image/layout.h"
#include "image/manifest.h"
#include "library/map_plan.h"
#include "library_fixture.h"

namespace unmoor {
namespace {

using Ranges = std::vector<MemoryRange>;

// The bytes of every range of the image in `dir`, mapped anywhere.
std::vector<uint8_t> BytesOfImage(const std::string& dir) {
  const auto image = PageImage::Open(dir);
  EXPECT_TRUE(image.ok()) << image.status().message();
  EXPECT_TRUE(image->Verify().ok()) << image->Verify().message();
  const auto map = DirectMap::Map(*image, {.placement = Placement::kAnywhere});
  EXPECT_TRUE(map.ok()) << map.status().message();
  std::vector<uint8_t> bytes;
  for (const MappedRange& range : map->ranges()) {
    const auto part = BytesAt(range.memory);
    bytes.insert(bytes.end(), part.begin(), part.end());
  }
  return bytes;
}

StatusOr<ImageReport> CheckpointOver(const std::string& base, const Ranges& ranges,
                                     const std::string& dir) {
  auto image = PageImage::Open(base);
  if (!image.ok()) return image.status();
  CheckpointOptions options;
  options.base = &*image;
  options.sync = false;
  return Checkpoint(ranges, dir, options);
}

TEST(Checkpoint, ADeltaHoldsJustThePagesThatDiffer) {
  const TemporaryDirectory dir;
  Memory memory(2000);
  memory.Fill(0, 1500);
  ASSERT_STATUS_OK(Checkpoint(Ranges{memory.range()}, dir / "1"));
  memory.page(7)[123] ^= 1;
  std::memset(memory.page(9), 0, kPageSize);  // zeros hide what the base has
  memory.Fill(1800, 2);                       // data where the base has none
  std::memset(memory.page(1900), 0, kPageSize);
  memory.page(11)[5] = memory.page(11)[5];  // written, not changed
  const auto report = CheckpointOver(dir / "1", {memory.range()}, dir / "2");
  ASSERT_STATUS_OK(report);
  EXPECT_TRUE(report->delta);
  EXPECT_EQ(report->written_bytes, 4 * kPageSize);
  EXPECT_EQ(report->shared_bytes, (1500 - 2) * kPageSize);
  EXPECT_EQ(PageImage::Open(dir / "2")->parent_id(), PageImage::Open(dir / "1")->id());
  ASSERT_TRUE(RemoveTree(dir / "1"));
  EXPECT_EQ(BytesOfImage(dir / "2"), memory.Copy());
}

TEST(Checkpoint, OfMemoryStillMappedLooksAtItsOwnPagesOnly) {
  const TemporaryDirectory dir;
  Memory memory(600);
  memory.Fill(0, 600);
  ASSERT_STATUS_OK(Checkpoint(Ranges{memory.range()}, dir / "1"));
  const MemoryRange range = memory.range();
  memory.Unmap();
  auto image = PageImage::Open(dir / "1");
  ASSERT_STATUS_OK(image);
  auto map = DirectMap::Map(*image);
  ASSERT_STATUS_OK(map);
  static_cast<uint8_t*>(range.begin)[5 * kPageSize] ^= 1;
  CheckpointOptions options;
  options.base = &*image;
  ASSERT_TRUE(RemoveTree(dir / "1"));  // the base may go before; it is open
  const auto report = Checkpoint(Ranges{range}, dir / "2", options);
  ASSERT_STATUS_OK(report);
  EXPECT_EQ(report->written_bytes, kPageSize);
  EXPECT_EQ(BytesOfImage(dir / "2"), BytesAt(range));
}

TEST(Checkpoint, WithNothingChangedWritesNoLayer) {
  const TemporaryDirectory dir;
  Memory memory(100);
  memory.Fill(0, 100);
  ASSERT_STATUS_OK(Checkpoint(Ranges{memory.range()}, dir / "1"));
  const auto report = CheckpointOver(dir / "1", {memory.range()}, dir / "2");
  ASSERT_STATUS_OK(report);
  EXPECT_EQ(report->written_bytes, 0u);
  EXPECT_EQ(ListDirectory(LayersDirectory(dir / "2"))->size(), 2u);
  EXPECT_EQ(Stat(LayerPagesPath(dir / "2", ReadManifest(dir / "1")->layers[0].id))->st_nlink, 2u);
  EXPECT_EQ(BytesOfImage(dir / "2"), memory.Copy());
}

TEST(Checkpoint, RangesThatGrewMovedShrankOrChangedProtection) {
  const TemporaryDirectory dir;
  Memory memory(100);
  memory.Fill(0, 100);
  ASSERT_STATUS_OK(
      Checkpoint(Ranges{memory.part(0, 20), memory.part(30, 20), memory.part(60, 20)}, dir / "1"));
  memory.page(35)[0] ^= 1;
  ::mprotect(memory.page(62), 4 * kPageSize, PROT_READ);
  // The first is gone, the second grew on both sides, the third shrank and is partly read-only.
  const Ranges now = {memory.part(25, 30), memory.part(61, 10)};
  const auto report = CheckpointOver(dir / "1", now, dir / "2");
  ASSERT_STATUS_OK(report);
  EXPECT_TRUE(report->delta);
  EXPECT_EQ(report->written_bytes, (10 + 1) * kPageSize);
  ASSERT_TRUE(RemoveTree(dir / "1"));
  auto expected = BytesAt(now[0]);
  const auto second = BytesAt(now[1]);
  expected.insert(expected.end(), second.begin(), second.end());
  EXPECT_EQ(BytesOfImage(dir / "2"), expected);
  const auto image = PageImage::Open(dir / "2");
  ASSERT_EQ(image->ranges().size(), 4u);
  EXPECT_EQ(image->ranges()[0].size, 30 * kPageSize);
  EXPECT_EQ(image->ranges()[2].protection, PROT_READ);
  EXPECT_EQ(image->ranges()[2].size, 4 * kPageSize);
}

TEST(Checkpoint, ADeltaCopiedIntoReadOnlyMemoryLeavesItReadOnly) {
  const TemporaryDirectory dir;
  Memory memory(100);
  memory.Fill(0, 100);
  ASSERT_STATUS_OK(Checkpoint(Ranges{memory.range()}, dir / "1"));
  memory.page(35)[0] ^= 1;
  ::mprotect(memory.page(30), 20 * kPageSize, PROT_READ);
  ASSERT_STATUS_OK(CheckpointOver(dir / "1", {memory.range()}, dir / "2"));
  const auto expected = memory.Copy();
  const MemoryRange range = memory.range();
  memory.Unmap();
  const auto map = DirectMap::Map(*PageImage::Open(dir / "2"));
  ASSERT_STATUS_OK(map);
  EXPECT_EQ(ProtectionsOf(range), "rw-p r--p rw-p");
  EXPECT_EQ(BytesAt(range), expected);
}

TEST(Checkpoint, LayersAreCopiedToAnotherFileSystem) {
  const TemporaryDirectory dir;
  const TemporaryDirectory other;
  if (::mount("none", other.path().c_str(), "tmpfs", 0, "size=64m") != 0) {
    GTEST_SKIP() << "cannot mount a tmpfs";
  }
  Memory memory(300);
  memory.Fill(0, 300);
  ASSERT_STATUS_OK(Checkpoint(Ranges{memory.range()}, dir / "1"));
  memory.page(3)[0] ^= 1;
  ASSERT_STATUS_OK(CheckpointOver(dir / "1", {memory.range()}, other / "2"));
  ASSERT_TRUE(RemoveTree(dir / "1"));
  EXPECT_EQ(BytesOfImage(other / "2"), memory.Copy());
  ::umount2(other.path().c_str(), MNT_DETACH);
}

TEST(Checkpoint, ATrackerNeedsABase) {
  const TemporaryDirectory dir;
  const Memory memory(1);
  CheckpointOptions options;
  options.tracker = reinterpret_cast<DirtyTracker*>(memory.page(0));
  EXPECT_CODE(StatusCode::kInvalidArgument, Checkpoint(Ranges{memory.range()}, dir / "1", options));
}

// Twenty-four generations: random writes and zeros, ranges that change, memory anonymous or mapped
// from the last image; the earlier image is deleted each time.
TEST(Checkpoint, ChainsOfDeltasStayExact) {
  constexpr size_t kPages = 1200;
  constexpr uint64_t kAddress = kTestAddresses + 0x2'1234'5000;
  for (const uint64_t seed : {1u, 2u, 3u}) {
    std::mt19937_64 random(seed);
    const TemporaryDirectory dir;
    Memory memory(kPages, kAddress);
    memory.Fill(0, kPages / 2);
    std::string last;
    uint64_t full = 0;
    for (int generation = 0; generation < 24; ++generation) {
      for (int i = 0; i < 40; ++i) {
        const size_t page = random() % kPages;
        const size_t count = std::min<size_t>(1 + random() % 24, kPages - page);
        if (random() % 4 == 0) {
          std::memset(memory.page(page), 0, count * kPageSize);
        } else {
          memory.Fill(page, count, static_cast<uint8_t>(random()));
        }
      }
      Ranges ranges;
      for (size_t page = random() % 100; page < kPages;) {
        const size_t count = std::min<size_t>(100 + random() % 900, kPages - page);
        ranges.push_back(memory.part(page, count));
        page += count + random() % 3 * 20;
      }
      std::vector<uint8_t> expected;
      for (const MemoryRange& range : ranges) {
        const auto part = BytesAt(range);
        expected.insert(expected.end(), part.begin(), part.end());
      }
      const std::string name = dir / std::to_string(generation);
      if (last.empty()) {
        ASSERT_STATUS_OK(Checkpoint(ranges, name));
      } else {
        const auto report = CheckpointOver(last, ranges, name);
        ASSERT_STATUS_OK(report);
        if (!report->delta) ++full;
        ASSERT_TRUE(RemoveTree(last));
      }
      last = name;
      ASSERT_EQ(BytesOfImage(name), expected) << "seed " << seed << ", generation " << generation;
      if (random() % 2 == 0) continue;
      for (const MemoryRange& range : ranges) ::munmap(range.begin, range.size);
      auto map = DirectMap::Map(*PageImage::Open(name));
      ASSERT_STATUS_OK(map);
      map->Release();
    }
    EXPECT_EQ(full, 0u);
    const auto manifest = ReadManifest(last);
    for (const ManifestVma& vma : manifest->tasks[0].vmas) EXPECT_LE(vma.deltas.size(), 16u);
  }
}

TEST(MapPlan, LongRunsAreMappedAndFewEnough) {
  PageImage::Impl image;
  image.directory = "/image";
  image.manifest.tasks.resize(1);
  ManifestVma vma;
  vma.range = {Vaddr(0x10000000), Vaddr(0x50000000)};
  vma.kind = VmaKind::kMapped;
  image.manifest.tasks[0].vmas = {vma};
  VmaPages pages;
  for (uint64_t i = 0; i < 100; ++i) {
    const Vaddr at = vma.range.begin + Bytes(i << 20);
    pages.deltas.push_back({{at, at + Bytes((i + 1) * kPageSize)}, 1, FileOffset(i << 20)});
  }
  image.pages = {pages};
  const auto enough = PlanMap(image, 10000);
  ASSERT_TRUE(enough);
  EXPECT_EQ(enough->at(0).copied.size(), 15u);
  EXPECT_EQ(enough->at(0).mapped.size(), 85u);
  const auto few = PlanMap(image, 41);
  ASSERT_TRUE(few);
  EXPECT_EQ(few->at(0).mapped.size(), 10u);
  EXPECT_EQ(few->at(0).mapped.back().range.size(), Bytes(100 * kPageSize));
  const auto none = PlanMap(image, 0);
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().errnum(), ENOMEM);
}

}  // namespace
}  // namespace unmoor
