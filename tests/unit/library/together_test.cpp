// The library's parts together: images with deltas are mapped, remapped while they are written and
// tracked, and made into the next image.
#include <atomic>
#include <random>
#include <thread>

#include "image/manifest.h"
#include "library/mapped_pieces.h"
#include "library_fixture.h"
#include "unmoor/background_remapper.h"
#include "unmoor/dirty_tracker.h"

namespace unmoor {
namespace {

using Ranges = std::vector<MemoryRange>;

std::vector<uint8_t> BytesOfImage(const std::string& dir) {
  const auto image = PageImage::Open(dir);
  EXPECT_TRUE(image.ok()) << image.status().message();
  EXPECT_TRUE(image->Verify().ok());
  const auto map = DirectMap::Map(*image, {.placement = Placement::kAnywhere});
  EXPECT_TRUE(map.ok()) << map.status().message();
  std::vector<uint8_t> bytes;
  for (const MappedRange& range : map->ranges()) {
    const auto part = BytesAt(range.memory);
    bytes.insert(bytes.end(), part.begin(), part.end());
  }
  return bytes;
}

// Skips the test where the kernel cannot remap.
#define START_OR_SKIP(name, expression)                   \
  auto name = (expression);                               \
  if (name.status().code() == StatusCode::kUnsupported) { \
    GTEST_SKIP() << name.status().message();              \
  }                                                       \
  ASSERT_STATUS_OK(name)

// An image of `memory` with two layers of deltas over it, runs long enough to be mapped among them.
void MakeImageWithDeltas(Memory& memory, const TemporaryDirectory& dir, size_t pages) {
  memory.Fill(0, pages / 2);
  ASSERT_STATUS_OK(Checkpoint(Ranges{memory.range()}, dir / "0"));
  for (int i = 1; i <= 2; ++i) {
    const auto salt = static_cast<uint8_t>(40 + i);
    memory.Fill(static_cast<size_t>(100 * i), 3, salt);
    memory.Fill(static_cast<size_t>(200 * i), 60, salt);
    memory.Fill(pages - 70 * static_cast<size_t>(i), 40, salt);
    std::memset(memory.page(50), 0, kPageSize);
    auto base = PageImage::Open(dir / std::to_string(i - 1));
    ASSERT_STATUS_OK(base);
    CheckpointOptions options;
    options.base = &*base;
    ASSERT_STATUS_OK(Checkpoint(Ranges{memory.range()}, dir / std::to_string(i), options));
  }
}

TEST(Together, AnImageWithDeltasIsRemappedWhole) {
  constexpr size_t kPages = 3000;
  const TemporaryDirectory dir;
  Memory memory(kPages);
  MakeImageWithDeltas(memory, dir, kPages);
  const auto expected = memory.Copy();
  const MemoryRange range = memory.range();
  memory.Unmap();
  const auto image = PageImage::Open(dir / "2");
  ASSERT_STATUS_OK(image);
  auto map = DirectMap::Map(*image);
  ASSERT_STATUS_OK(map);
  EXPECT_GT(PiecesOf(*map).size(), 3u);
  ASSERT_EQ(BytesAt(range), expected);
  START_OR_SKIP(remapper, BackgroundRemapper::Start(*map));
  ASSERT_STATUS_OK(remapper->Wait(std::chrono::seconds(60)));
  EXPECT_EQ(remapper->progress().status, RemapStatus::kReady);
  EXPECT_EQ(BytesAt(range), expected);
  EXPECT_EQ(ProtectionsOf(range), "rw-p");
  EXPECT_EQ(QueryStatus()->direct_mapped_bytes, 0u);
  // Nothing of the image is needed any more.
  for (const char* name : {"0", "1", "2"}) ASSERT_TRUE(RemoveTree(dir / name));
  ASSERT_STATUS_OK(Checkpoint(Ranges{range}, dir / "3"));
  EXPECT_EQ(BytesOfImage(dir / "3"), expected);
}

TEST(Together, ATrackedCheckpointEqualsAComparedOne) {
  constexpr size_t kPages = 4000;
  const TemporaryDirectory dir;
  Memory memory(kPages);
  memory.Fill(0, kPages);
  const MemoryRange range = memory.range();
  ASSERT_STATUS_OK(Checkpoint(Ranges{range}, dir / "0"));
  memory.Unmap();
  auto base = PageImage::Open(dir / "0");
  ASSERT_STATUS_OK(base);
  auto map = DirectMap::Map(*base);
  ASSERT_STATUS_OK(map);
  auto* const words = static_cast<uint64_t*>(range.begin);
  constexpr size_t kWordsOfPage = kPageSize / sizeof(uint64_t);

  START_OR_SKIP(tracker, DirtyTracker::Start(Ranges{range}));
  RemapOptions remap_options;
  remap_options.tracker = &*tracker;
  START_OR_SKIP(remapper, BackgroundRemapper::Start(*map, remap_options));
  std::mt19937_64 random(7);
  for (int i = 0; i < 300; ++i) ++words[random() % kPages * kWordsOfPage + 3];
  ASSERT_STATUS_OK(remapper->Wait(std::chrono::seconds(60)));
  for (int i = 0; i < 100; ++i) ++words[random() % kPages * kWordsOfPage + 5];

  for (int generation = 1; generation <= 3; ++generation) {
    CheckpointOptions options;
    options.base = &*base;
    const auto compared = Checkpoint(Ranges{range}, dir / "compared", options);
    ASSERT_STATUS_OK(compared);
    options.tracker = &*tracker;
    const std::string name = dir / std::to_string(generation);
    const auto tracked = Checkpoint(Ranges{range}, name, options);
    ASSERT_STATUS_OK(tracked);
    EXPECT_EQ(tracked->written_bytes, compared->written_bytes);
    EXPECT_GT(tracked->written_bytes, 0u);
    EXPECT_LT(tracked->written_bytes, 500 * kPageSize);
    EXPECT_EQ(BytesOfImage(name), BytesAt(range));
    ASSERT_STATUS_OK(tracker->Reset());
    base = PageImage::Open(name);
    ASSERT_STATUS_OK(base);
    ASSERT_TRUE(RemoveTree(dir / "compared"));
    for (int i = 0; i < 50; ++i) ++words[random() % kPages * kWordsOfPage + 7];
  }
}

TEST(Together, MemoryTheTrackerLostIsCompared) {
  constexpr size_t kPages = 100;
  const TemporaryDirectory dir;
  Memory memory(kPages);
  memory.Fill(0, kPages);
  ASSERT_STATUS_OK(Checkpoint(Ranges{memory.range()}, dir / "0"));
  auto base = PageImage::Open(dir / "0");
  ASSERT_STATUS_OK(base);
  START_OR_SKIP(tracker, DirtyTracker::Start(Ranges{memory.range()}));
  // Other memory in the place of some that was tracked.
  ASSERT_NE(::mmap(memory.page(10), 5 * kPageSize, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
            MAP_FAILED);
  memory.Fill(12, 2, 77);
  // Given back, and so zero.
  ::madvise(memory.page(40), 3 * kPageSize, MADV_DONTNEED);
  CheckpointOptions options;
  options.base = &*base;
  options.tracker = &*tracker;
  const auto report = Checkpoint(Ranges{memory.range()}, dir / "1", options);
  ASSERT_STATUS_OK(report);
  EXPECT_EQ(BytesOfImage(dir / "1"), memory.Copy());
  EXPECT_EQ(report->written_bytes, (5 + 3) * kPageSize);
}

// Several threads write while their memory is remapped; then everything is checkpointed.
TEST(Together, WritersLoseNothingFromImageToImage) {
  constexpr size_t kPages = 8192;
  constexpr int kThreads = 3;
  const TemporaryDirectory dir;
  Memory memory(kPages, kTestAddresses + 0x2'0000'0000);
  const MemoryRange range = memory.range();
  memory.Fill(0, kPages);
  std::memset(range.begin, 0, 64 * kPageSize);
  ASSERT_STATUS_OK(Checkpoint(Ranges{range}, dir / "0"));
  memory.Unmap();
  auto base = PageImage::Open(dir / "0");
  ASSERT_STATUS_OK(base);
  auto map = DirectMap::Map(*base);
  ASSERT_STATUS_OK(map);
  auto* const words = static_cast<uint64_t*>(range.begin);
  constexpr size_t kWords = kPages * kPageSize / sizeof(uint64_t);
  START_OR_SKIP(remapper, BackgroundRemapper::Start(*map));
  std::atomic<bool> stop{false};
  std::vector<uint64_t> writes(kThreads);
  std::vector<uint64_t> sum_before(kThreads);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t) {
    for (size_t i = t; i < kWords; i += kThreads) sum_before[t] += words[i];
  }
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(t);
      for (uint64_t done = 0; !stop.load() || done < 100'000; ++done) {
        ++words[random() % (kWords / kThreads - 1) * kThreads + t];
        writes[t] = done + 1;
      }
    });
  }
  const Status waited = remapper->Wait(std::chrono::seconds(120));
  stop = true;
  for (std::thread& thread : threads) thread.join();
  ASSERT_STATUS_OK(waited);
  for (size_t t = 0; t < kThreads; ++t) {
    uint64_t sum = 0;
    for (size_t i = t; i < kWords; i += kThreads) sum += words[i];
    EXPECT_EQ(sum - sum_before[t], writes[t]) << "thread " << t;
  }
  CheckpointOptions options;
  options.base = &*base;
  ASSERT_STATUS_OK(Checkpoint(Ranges{range}, dir / "1", options));
  ASSERT_TRUE(RemoveTree(dir / "0"));
  EXPECT_EQ(BytesOfImage(dir / "1"), BytesAt(range));
}

}  // namespace
}  // namespace unmoor
