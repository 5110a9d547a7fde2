// Which layer a page comes from, and that manifest and index must agree.
#include "image/overlay.h"

#include <gtest/gtest.h>

#include <random>

namespace unmoor {
namespace {

constexpr uint64_t kBase = 0x10000000;
constexpr uint64_t kPages = 64;

VaddrRange At(uint64_t page, uint64_t pages) {
  return {Vaddr(kBase + page * kPageSize), Vaddr(kBase + (page + pages) * kPageSize)};
}

// A layer whose one extent, at file offset `offset`, holds the pages for which `has` is true.
LayerInfo MakeLayer(uint64_t offset, const std::vector<bool>& has) {
  LayerInfo layer;
  layer.id = "layer";
  layer.extents = {{1, At(0, kPages), FileOffset(offset), Bytes(0)}};
  for (uint64_t i = 0; i < kPages; ++i) {
    if (!has[i]) continue;
    if (!layer.segments.empty() && layer.segments.back().range.end == At(i, 1).begin) {
      layer.segments.back().range.end = At(i, 1).end;
    } else {
      layer.segments.push_back({1, At(i, 1), FileOffset(offset + i * kPageSize)});
    }
  }
  return layer;
}

TEST(Overlay, EachPageComesFromTheTopmostLayerThatHasIt) {
  std::mt19937_64 random(20261121);
  for (int round = 0; round < 300; ++round) {
    std::vector<std::vector<bool>> has(4, std::vector<bool>(kPages));
    std::vector<LayerInfo> layers;
    for (size_t i = 0; i < has.size(); ++i) {
      const uint64_t density = random() % 5;
      for (uint64_t page = 0; page < kPages; ++page) has[i][page] = random() % 5 < density;
      layers.push_back(MakeLayer((i + 1) * kHugePageSize, has[i]));
    }
    const std::vector<const LayerInfo*> list = {&layers[0], &layers[1], &layers[2], &layers[3]};
    const uint64_t first = random() % 32;
    const uint64_t count = 1 + random() % 32;
    ManifestVma vma;
    vma.range = At(first, count);
    vma.kind = VmaKind::kMapped;
    const auto offset = [&](uint64_t layer) {
      return FileOffset((layer + 1) * kHugePageSize + first * kPageSize);
    };
    vma.offset = offset(0);
    vma.deltas = {{1, offset(1)}, {2, offset(2)}, {3, offset(3)}};
    const auto pages = Overlay(list, "/d").Resolve(1, vma);
    ASSERT_TRUE(pages) << pages.error().message();
    std::vector<uint32_t> from(kPages, 0);
    Vaddr previous;
    for (const OverlayRun& run : pages->deltas) {
      ASSERT_GE(run.range.begin, previous);
      previous = run.range.end;
      for (uint64_t at = run.range.begin.value; at < run.range.end.value; at += kPageSize) {
        from[(at - kBase) / kPageSize] = run.layer;
      }
      ASSERT_EQ(run.offset.value, (run.layer + 1) * kHugePageSize + run.range.begin.value - kBase);
    }
    uint64_t data = 0;
    for (uint64_t page = first; page < first + count; ++page) {
      uint32_t expected = 0;
      for (uint32_t layer = 1; layer < 4; ++layer) {
        if (has[layer][page]) expected = layer;
      }
      ASSERT_EQ(from[page], expected) << "round " << round << " page " << page;
      if (expected != 0 || has[0][page]) ++data;
    }
    EXPECT_EQ(pages->data.value, data * kPageSize);
  }
}

TEST(Overlay, ManifestAndIndexMustAgree) {
  const LayerInfo layer = MakeLayer(kHugePageSize, std::vector<bool>(kPages, true));
  const std::vector<const LayerInfo*> list = {&layer};
  const Overlay overlay(list, "/d");
  ManifestVma vma;
  vma.range = At(4, 8);
  vma.offset = FileOffset(kHugePageSize + 4 * kPageSize);
  EXPECT_TRUE(overlay.Resolve(1, vma));
  EXPECT_TRUE(overlay.Resolve(2, vma));  // a child's VMA may lie over its parent's extent
  vma.offset = vma.offset + Bytes(kPageSize);
  EXPECT_FALSE(overlay.Resolve(1, vma));
  vma.range = At(60, 8);
  vma.offset = FileOffset(kHugePageSize + 60 * kPageSize);
  ASSERT_TRUE(overlay.Resolve(1, vma));  // into the gap
  EXPECT_EQ(overlay.Resolve(1, vma)->data.value, 4 * kPageSize);
  vma.range = At(64, 8);
  vma.offset = FileOffset(kHugePageSize + 64 * kPageSize);
  EXPECT_FALSE(overlay.Resolve(1, vma));
}

TEST(Overlay, AVmaIsReachedOnlyWhereNoOldBytesCouldShow) {
  LayerInfo layer = MakeLayer(kHugePageSize, std::vector<bool>(kPages, true));
  const VaddrRange next{Vaddr(0x40000000), Vaddr(0x40001000)};
  layer.extents.push_back({1, next, FileOffset(5 * kHugePageSize), Bytes(0)});
  layer.file_size = Bytes(8 * kHugePageSize);
  const std::vector<const LayerInfo*> list = {&layer};
  const Overlay overlay(list, "/d");
  ManifestVma vma;
  vma.range = At(0, kPages);
  vma.offset = FileOffset(kHugePageSize);
  EXPECT_TRUE(overlay.Reach(vma, vma.range));
  const auto grown = overlay.Reach(vma, At(0, kPages + 512));
  ASSERT_TRUE(grown);
  EXPECT_EQ(overlay.Resolve(1, *grown)->data.value, kPages * kPageSize);
  const auto cut_in_front = overlay.Reach(vma, At(16, kPages - 16));
  ASSERT_TRUE(cut_in_front);
  EXPECT_EQ(cut_in_front->offset.value, kHugePageSize + 16 * kPageSize);
  // It would grow into what the layer has behind it.
  EXPECT_FALSE(overlay.Reach(vma, At(0, kPages - 1)));
  // No gap would be left, or the next extent is reached.
  EXPECT_FALSE(overlay.Reach(vma, At(0, 4 * 512 - 1)));
  EXPECT_FALSE(overlay.Reach(vma, At(0, 5 * 512)));
  // Before the file's begin.
  EXPECT_FALSE(overlay.Reach(vma, {Vaddr(kBase - 2 * kHugePageSize), At(0, kPages).end}));
}

}  // namespace
}  // namespace unmoor
