// Micro benchmarks (Google Benchmark) of what a remap and a restore are made of: copying and moving
// 2 MiB, hashing a block, finding an address in an index, rewriting CRIU's metadata.
//
// bench_micro [--benchmark_…]; `bench/run --only micro` runs it. UNMOOR_BENCH_IMAGE names an image
// directory for what needs one; without it these are left out, which is said.
#include <benchmark/benchmark.h>
#include <sys/mman.h>
#include <xxhash.h>

#include <cstdlib>
#include <cstring>
#include <random>

#include "criu/rewrite.h"
#include "image/layer_reader.h"
#include "image/layout.h"
#include "image/manifest.h"
#include "os/file.h"
#include "restore/plan.h"

namespace unmoor {
namespace {

constexpr size_t kHuge = 2 << 20;

class Memory {
 public:
  Memory(size_t size, int advice) : size_(size) {
    // Room to begin at a multiple of 2 MiB.
    begin_ =
        mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const auto at = (reinterpret_cast<uintptr_t>(begin_) + kHuge - 1) / kHuge * kHuge;
    data_ = reinterpret_cast<char*>(at);  // SAFETY: inside the mapping
    madvise(data_, size, advice);
  }
  ~Memory() { munmap(begin_, size_ + kHuge); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  [[nodiscard]] char* data() const { return data_; }

 private:
  size_t size_;
  void* begin_ = nullptr;
  char* data_ = nullptr;
};

// From and into memory that is there, larger than the caches.
void Copy(benchmark::State& state) {
  const int advice = state.range(0) != 0 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE;
  constexpr size_t kBlocks = 32;
  const Memory from(kBlocks * kHuge, advice);
  const Memory to(kBlocks * kHuge, advice);
  std::memset(from.data(), 1, kBlocks * kHuge);
  std::memset(to.data(), 2, kBlocks * kHuge);
  size_t block = 0;
  for (auto _ : state) {
    std::memcpy(to.data() + block * kHuge, from.data() + block * kHuge, kHuge);
    block = (block + 1) % kBlocks;
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * kHuge));
}
BENCHMARK(Copy)->ArgName("huge")->Arg(0)->Arg(1);

// Into memory that is not there yet: what a remap has to pay for pages.
void CopyIntoFreshPages(benchmark::State& state) {
  const int advice = state.range(0) != 0 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE;
  const Memory from(kHuge, MADV_NOHUGEPAGE);
  const Memory to(kHuge, advice);
  std::memset(from.data(), 1, kHuge);
  for (auto _ : state) {
    madvise(to.data(), kHuge, MADV_DONTNEED);
    std::memcpy(to.data(), from.data(), kHuge);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * kHuge));
}
BENCHMARK(CopyIntoFreshPages)->ArgName("huge")->Arg(0)->Arg(1);

// There and back again: two moves of 2 MiB that are there.
void Move(benchmark::State& state) {
  const int advice = state.range(0) != 0 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE;
  const Memory one(kHuge, advice);
  const Memory other(kHuge, advice);
  std::memset(one.data(), 1, kHuge);
  for (auto _ : state) {
    void* there = mremap(one.data(), kHuge, kHuge, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
                         other.data());
    void* back = mremap(other.data(), kHuge, kHuge,
                        MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, one.data());
    if (there == MAP_FAILED || back == MAP_FAILED) state.SkipWithError("mremap failed");
  }
  if (one.data()[kHuge / 2] != 1) state.SkipWithError("WRONG MEMORY after mremap");
  state.SetItemsProcessed(static_cast<int64_t>(state.iterations() * 2));
}
BENCHMARK(Move)->ArgName("huge")->Arg(0)->Arg(1);

void HashBlock(benchmark::State& state) {
  constexpr size_t kBlocks = 512;
  const Memory memory(kBlocks * kBlockSize, MADV_HUGEPAGE);
  std::memset(memory.data(), 3, kBlocks * kBlockSize);
  size_t block = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(XXH3_64bits(memory.data() + block * kBlockSize, kBlockSize));
    block = (block + 1) % kBlocks;
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * kBlockSize));
}
BENCHMARK(HashBlock);

struct OpenImage {
  std::string directory;
  Manifest manifest;
  std::vector<LayerReader> layers;
};

Result<OpenImage> Open() {
  const char* const directory = std::getenv("UNMOOR_BENCH_IMAGE");
  if (directory == nullptr) return UserError("UNMOOR_BENCH_IMAGE names no image");
  OpenImage image;
  image.directory = directory;
  UNMOOR_ASSIGN(image.manifest, ReadManifest(directory));
  for (const ManifestLayer& entry : image.manifest.layers) {
    UNMOOR_ASSIGN(LayerReader layer, LayerReader::Open(directory, entry));
    image.layers.push_back(std::move(layer));
  }
  return image;
}

void OpenManifestAndIndexes(benchmark::State& state) {
  for (auto _ : state) {
    const auto image = Open();
    if (!image) state.SkipWithError(image.error().message().c_str());
  }
}
BENCHMARK(OpenManifestAndIndexes);

void FindInIndex(benchmark::State& state) {
  const auto image = Open();
  if (!image || image->layers.empty()) {
    state.SkipWithError(image ? "an image without layers" : image.error().message().c_str());
    return;
  }
  const LayerReader& layer = image->layers.front();
  std::minstd_rand random(1);
  for (auto _ : state) {
    const Extent& extent = layer.extents()[random() % layer.extents().size()];
    const Vaddr at = extent.range.begin + Bytes(random() % extent.range.size().value);
    benchmark::DoNotOptimize(layer.FindExtent(extent.task_vpid, at));
  }
}
BENCHMARK(FindInIndex);

void RewriteMetadata(benchmark::State& state) {
  const auto image = Open();
  const auto view =
      image ? MakeTemporaryDirectory("/dev/shm", "unmoor-micro-") : Failure(image.error());
  if (!view) {
    state.SkipWithError(view.error().message().c_str());
    return;
  }
  std::vector<LayerInfo> infos;
  std::vector<criu::LayerFile> files;
  for (const LayerReader& layer : image->layers) {
    infos.push_back(layer.info());
    files.push_back({layer.pages_fd().get(), layer.pages_path()});
  }
  for (auto _ : state) {
    const auto plan = PlanRestore(image->manifest, infos, image->directory);
    if (!plan) {
      state.SkipWithError(plan.error().message().c_str());
      break;
    }
    const std::string images = *view + "/images";
    if (!MakeDirectory(images) ||
        !criu::RewriteForDirectMap(CriuDirectory(image->directory), images, plan->tasks, files)) {
      state.SkipWithError("the metadata cannot be rewritten");
      break;
    }
    state.PauseTiming();
    (void)RemoveTree(images);
    state.ResumeTiming();
  }
  (void)RemoveTree(*view);
}
BENCHMARK(RewriteMetadata);

}  // namespace
}  // namespace unmoor

BENCHMARK_MAIN();
