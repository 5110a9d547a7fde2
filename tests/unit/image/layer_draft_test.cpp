// A layer that is written over and over before it is one.
#include "image/layer_draft.h"

#include <random>

#include "image_fixture.h"

namespace unmoor {
namespace {

Result<LayerReader> OpenLayer(const std::string& dir) {
  const std::string stem = dir + "/" + kTestLayerId;
  return LayerReader::Open(stem + ".pages", stem + ".index");
}

TEST(LayerDraft, ShowsTheLastOfWhatWasWritten) {
  const TemporaryDirectory dir;
  const VaddrRange vmas[] = {Pages(0x7f0000123000, 700), Pages(0x7f0010000000, 40)};
  auto draft = LayerDraft::Create(dir.path(), kTestLayerId);
  ASSERT_OK(draft);
  for (const uint32_t task : {7u, 8u}) {
    for (const VaddrRange vma : vmas) ASSERT_OK(draft->AddVma(task, vma));
  }
  std::mt19937 random(1);
  const auto below = [&](uint64_t n) {
    return std::uniform_int_distribution<uint64_t>(0, n - 1)(random);
  };
  std::map<std::pair<uint32_t, Vaddr>, std::vector<std::byte>> expected;
  for (int i = 0; i < 400; ++i) {
    const auto task = static_cast<uint32_t>(7 + below(2));
    const VaddrRange vma = vmas[below(2)];
    const uint64_t pages = vma.size().value / kPageSize;
    const uint64_t first = below(pages);
    const uint64_t count = 1 + below(std::min<uint64_t>(pages - first, 300));
    const Vaddr at = vma.begin + Bytes(first * kPageSize);
    const bool zeros = below(4) == 0;
    std::vector<std::byte> bytes(count * kPageSize);
    if (!zeros) bytes = PageContents(task + static_cast<uint32_t>(below(3)), at, count);
    Bytes changed;
    for (uint64_t page = 0; page < count; ++page) {
      const auto* const begin = bytes.data() + page * kPageSize;
      std::vector<std::byte>& old = expected[{task, at + Bytes(page * kPageSize)}];
      if (old.empty()) old.resize(kPageSize);
      const std::vector<std::byte> now(begin, begin + kPageSize);
      if (old != now) changed += Bytes(kPageSize);
      old = now;
    }
    const auto written = zeros && below(2) == 0
                             ? draft->ShowZeros(task, {at, at + Bytes(bytes.size())})
                             : draft->Show(task, at, bytes);
    ASSERT_OK(written);
    EXPECT_EQ(written->value, changed.value);
  }
  const auto info = draft->Finish();
  ASSERT_OK(info);
  auto reader = OpenLayer(dir.path());
  ASSERT_OK(reader);
  ASSERT_OK(reader->LoadHashes());
  ASSERT_OK(reader->VerifyAll());
  Bytes data;
  for (const auto& [place, page] : expected) {
    const Extent* const extent = reader->FindExtent(place.first, place.second);
    ASSERT_NE(extent, nullptr);
    std::vector<std::byte> found(kPageSize);
    ASSERT_OK(ReadExactlyAt(reader->pages_fd().get(), found,
                            extent->offset + (place.second - extent->range.begin), "pages"));
    ASSERT_EQ(found, page);
    if (page != std::vector<std::byte>(kPageSize)) data += Bytes(kPageSize);
  }
  EXPECT_EQ(reader->info().data_bytes.value, data.value);
  EXPECT_EQ(info->segments, reader->segments());
}

TEST(LayerDraft, WhatIsNoPlaceOfItIsRefused) {
  const TemporaryDirectory dir;
  auto draft = LayerDraft::Create(dir.path(), kTestLayerId);
  ASSERT_OK(draft);
  const VaddrRange vma = Pages(0x7f0000123000, 8);
  ASSERT_OK(draft->AddVma(7, vma));
  const auto page = PageContents(7, vma.begin, 2);
  EXPECT_FALSE(draft->Show(8, vma.begin, page).has_value());
  EXPECT_FALSE(draft->Show(7, vma.end, page).has_value());
  EXPECT_FALSE(draft->Show(7, vma.end - Bytes(kPageSize), page).has_value());
  EXPECT_FALSE(draft->Show(7, vma.begin - Bytes(kPageSize), page).has_value());
}

}  // namespace
}  // namespace unmoor
