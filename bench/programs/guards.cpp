// In-process remap under writers: how fast, and how long a writer waits, by guard and by rivals.
//
//   bench_guards --dir DIR --mib N --writers N --pattern none|clean|hot|uniform --way WAY
//
// WAY: freeze, fault        unmoor's BackgroundRemapper
//      unverified           freeze, without comparing the image's pages with their hashes
//      moved                the best loop known: memcpy into one huge scratch block, UFFDIO_MOVE,
//      mremap naive                2 MiB memcpy and mremap under a lock that every write takes too
//      populate             MADV_POPULATE_WRITE: pages become private in place, 4 KiB each, and the
//                           mapping stays one of the file
//      null                 nothing is remapped; a thread runs the best copy-and-mremap loop on
//                           memory of its own, so that the machine is as busy
//
// `none`: nobody writes and --writers is not looked at; what is measured is the rate alone. Else
// each writer owns every n-th page and stores to one word of a page at a time. `clean` writes to
// memory that is not remapped (as fast as the others), `hot` to one page in twenty. A stall is the
// time between two stores of a thread; the histogram has 16 buckets an octave (6 % wide). At the
// end every word is compared with what was stored or with the image. One line of JSON.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <x86intrin.h>

#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

#include "os/kernel_abi.h"
#include "unmoor/background_remapper.h"
#include "unmoor/checkpoint.h"
#include "unmoor/direct_map.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kPage = 4096, kBlock = size_t{2} << 20;
constexpr auto kPhase = std::chrono::milliseconds(400);

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "bench_guards: %s\n", what.c_str());
  std::exit(1);
}

uint64_t ImageWord(size_t page) {
  return (page + 1) * 0x9e3779b97f4a7c15u;
}

struct Histogram {
  std::vector<uint64_t> counts = std::vector<uint64_t>(64 * 16);
  uint64_t longest = 0;

  void Add(uint64_t ticks) {
    const auto octave = static_cast<unsigned>(std::bit_width(ticks | 16)) - 1;
    counts[octave * 16 + ((ticks >> (octave - 4)) & 15)]++;
    longest = std::max(longest, ticks);
  }
  void Merge(const Histogram& other) {
    for (size_t i = 0; i < counts.size(); ++i) counts[i] += other.counts[i];
    longest = std::max(longest, other.longest);
  }
  [[nodiscard]] double Quantile(double q) const {
    uint64_t total = 0, seen = 0;
    for (const uint64_t n : counts) total += n;
    for (size_t i = 0; i < counts.size(); ++i) {
      seen += counts[i];
      if (static_cast<double>(seen) >= q * static_cast<double>(total)) {
        return static_cast<double>((16 + i % 16) << (i / 16)) / 16;
      }
    }
    return 0;
  }
};

enum Phase { kBefore, kDuring, kAfter, kStop };

struct Bench {
  std::string dir, pattern, way;
  size_t pages = 0, writers = 1;
  char* memory = nullptr;  // direct-mapped, then remapped
  char* aside = nullptr;   // for `clean`
  std::atomic<int> phase{kBefore};
  std::shared_mutex lock;  // of `naive`

  struct Writer {
    std::vector<uint32_t> stored;  // by page
    Histogram stalls[3];
    std::atomic<uint64_t> stores[3] = {};
  };
  std::vector<std::unique_ptr<Writer>> states;

  void Write(size_t index) {
    Writer& own = *states[index];
    const bool locks = way == "naive";
    const bool clean = pattern == "clean";
    const size_t share = pages / writers / (pattern == "hot" ? 20 : 1);
    uint64_t random = 88172645463325252u + index;
    uint64_t last = __rdtsc();
    for (int now; (now = phase.load(std::memory_order_relaxed)) != kStop;) {
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;
      const size_t page = random % share * writers + index;
      const bool remapped = !clean && now != kBefore;
      char* const base = remapped ? memory : aside;
      own.stored[page] += remapped ? 1 : 0;
      // SAFETY: a word of a page of ours.
      auto* word = reinterpret_cast<volatile uint64_t*>(base + page * kPage) + 1 + random % 500;
      if (locks) lock.lock_shared();
      *word = random;
      *(reinterpret_cast<volatile uint64_t*>(base + page * kPage)) = own.stored[page];
      if (locks) lock.unlock_shared();
      const uint64_t time = __rdtsc();
      own.stalls[now].Add(time - last);
      own.stores[now].fetch_add(1, std::memory_order_relaxed);
      last = time;
    }
  }

  // The number of stores is in each page's first word; the rest is the image's but for those.
  void Verify() const {
    const char* base = memory;
    for (size_t page = 0; page < pages; ++page) {
      const uint64_t stored = writers == 0 ? 0 : states[page % writers]->stored[page];
      const auto* words = reinterpret_cast<const uint64_t*>(base + page * kPage);
      if (words[0] != stored || words[511] != ImageWord(page)) Fail("a page is wrong");
    }
  }
};

char* Map(size_t bytes) {
  void* at = ::mmap(nullptr, bytes + kBlock, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) Fail("mmap");
  const auto begin = (reinterpret_cast<uintptr_t>(at) + kBlock - 1) / kBlock * kBlock;
  return reinterpret_cast<char*>(begin);
}

// Memory that the host has not backed yet costs its first user several times a copy: as in
// bench_copy_remap, nobody pays for that here.
void WarmGuest(size_t bytes) {
  char* memory = Map(bytes);
  ::madvise(memory, bytes, MADV_HUGEPAGE);
  for (size_t at = 0; at < bytes; at += kPage) memory[at] = 1;
  ::munmap(memory, bytes);
}

void MakeImage(const Bench& bench) {
  char* memory = Map(bench.pages * kPage);
  for (size_t page = 0; page < bench.pages; ++page) {
    auto* words = reinterpret_cast<uint64_t*>(memory + page * kPage);
    for (size_t i = 1; i < 512; ++i) words[i] = ImageWord(page);
  }
  const unmoor::MemoryRange range{memory, bench.pages * kPage};
  unmoor::CheckpointOptions options;
  options.sync = false;
  const auto made = unmoor::Checkpoint({&range, 1}, bench.dir, options);
  if (!made.ok()) Fail(made.status().message());
  ::munmap(memory, bench.pages * kPage);
}

// 2 MiB memcpy into fresh memory and mremap into place, as fast as it goes. `lock`: taken for each.
void CopyAndMove(char* from, char* to, size_t bytes, std::shared_mutex* lock) {
  char* staging = Map(bytes);
  for (size_t at = 0; at < bytes; at += kBlock) {
    std::unique_lock<std::shared_mutex> held;
    if (lock != nullptr) held = std::unique_lock(*lock);
    ::madvise(staging + at, kBlock, MADV_HUGEPAGE);
    std::memcpy(staging + at, from + at, kBlock);
    if (::mremap(staging + at, kBlock, kBlock, MREMAP_MAYMOVE | MREMAP_FIXED, to + at) ==
        MAP_FAILED) {
      Fail("mremap");
    }
  }
}

// Loop G of bench_copy_remap.
void CopyScratchAndMove(char* memory, size_t bytes) {
  const auto fd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY));
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = unmoor::kernel::kUffdFeatureMove;
  if (fd < 0 || ::ioctl(fd, UFFDIO_API, &api) != 0) Fail("userfaultfd");
  char* scratch = Map(kBlock);
  ::madvise(scratch, kBlock, MADV_HUGEPAGE);
  char* staging = Map(bytes);
  const auto to = reinterpret_cast<uint64_t>(staging);
  uffdio_register whole{{to, bytes}, UFFDIO_REGISTER_MODE_MISSING, 0};
  if (::ioctl(fd, UFFDIO_REGISTER, &whole) != 0) Fail("UFFDIO_REGISTER");
  for (size_t at = 0; at < bytes; at += kBlock) {
    std::memcpy(scratch, memory + at, kBlock);
    uint64_t move[5] = {to + at, reinterpret_cast<uint64_t>(scratch), kBlock, 0, 0};
    uffdio_range block{to + at, kBlock};
    if (::ioctl(fd, UFFDIO_MOVE, move) != 0 || ::ioctl(fd, UFFDIO_UNREGISTER, &block) != 0 ||
        ::mremap(staging + at, kBlock, kBlock, MREMAP_MAYMOVE | MREMAP_FIXED, memory + at) ==
            MAP_FAILED) {
      Fail("moving a block");
    }
  }
  ::close(fd);
}

struct Outcome {
  double seconds = 0;
  unmoor::RemapProgress progress;
};

Outcome Remap(Bench& bench, const unmoor::DirectMap& map) {
  const size_t bytes = bench.pages * kPage;
  Outcome outcome;
  const auto begin = Clock::now();
  if (bench.way == "freeze" || bench.way == "fault" || bench.way == "unverified") {
    unmoor::RemapOptions options;
    options.verify = bench.way != "unverified";
    options.guard = bench.way == "fault" ? unmoor::Guard::kFault : unmoor::Guard::kFreeze;
    const unmoor::RemapRange range{{bench.memory, bytes}, bench.way != "fault"};
    auto remapper = unmoor::BackgroundRemapper::Start(map, {&range, 1}, options);
    if (!remapper.ok()) Fail(remapper.status().message());
    const unmoor::Status ready = remapper->Wait(std::chrono::minutes(2));
    if (!ready.ok()) Fail(ready.message());
    outcome.progress = remapper->progress();
  } else if (bench.way == "moved") {
    CopyScratchAndMove(bench.memory, bytes);
  } else if (bench.way == "naive") {
    CopyAndMove(bench.memory, bench.memory, bytes, &bench.lock);
  } else if (bench.way == "populate") {
    for (size_t at = 0; at < bytes; at += kBlock) {
      if (::madvise(bench.memory + at, kBlock, MADV_POPULATE_WRITE) != 0) Fail("populate");
    }
  } else {
    char* other = Map(bytes);
    std::memset(other, 1, bytes);
    CopyAndMove(other, other, bytes, nullptr);
  }
  outcome.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  return outcome;
}

double TicksPerNanosecond() {
  const auto begin = Clock::now();
  const uint64_t first = __rdtsc();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const uint64_t ticks = __rdtsc() - first;
  return static_cast<double>(ticks) /
         static_cast<double>(std::chrono::nanoseconds(Clock::now() - begin).count());
}

void Report(const Bench& bench, const Outcome& outcome, const double (&seconds)[3]) {
  const double ticks = TicksPerNanosecond();
  Histogram during;
  double rate[3] = {};
  for (const auto& state : bench.states) {
    during.Merge(state->stalls[kDuring]);
    for (int i = 0; i < 3; ++i)
      rate[i] += static_cast<double>(state->stores[i].load()) / seconds[i];
  }
  const auto stall = [&](double q) { return during.Quantile(q) / ticks; };
  std::printf(
      "{\"way\": \"%s\", \"pattern\": \"%s\", \"writers\": %zu, \"mib\": %zu, "
      "\"gb_per_s\": %.3f, \"stall_p50_ns\": %.0f, \"stall_p99_ns\": %.0f, "
      "\"stall_p999_ns\": %.0f, \"stall_p9999_ns\": %.0f, \"stall_max_ns\": %.0f, "
      "\"stores_before\": %.0f, \"stores_during\": %.0f, \"stores_after\": %.0f, "
      "\"windows\": %llu, \"aborted\": %llu, \"longest_pause_ns\": %lld, "
      "\"longest_guard_ns\": %lld}\n",
      bench.way.c_str(), bench.pattern.c_str(), bench.writers, bench.pages * kPage >> 20,
      static_cast<double>(bench.pages * kPage) / outcome.seconds / 1e9, stall(0.5), stall(0.99),
      stall(0.999), stall(0.9999), static_cast<double>(during.longest) / ticks, rate[0], rate[1],
      rate[2], static_cast<unsigned long long>(outcome.progress.windows),
      static_cast<unsigned long long>(outcome.progress.aborted),
      static_cast<long long>(outcome.progress.longest_pause.count()),
      static_cast<long long>(outcome.progress.longest_guard.count()));
}

}  // namespace

int main(int argc, char** argv) {
  Bench bench;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--dir") bench.dir = value;
    if (name == "--mib") bench.pages = std::strtoul(argv[i + 1], nullptr, 10) << 8;
    if (name == "--writers") bench.writers = std::strtoul(argv[i + 1], nullptr, 10);
    if (name == "--pattern") bench.pattern = value;
    if (name == "--way") bench.way = value;
  }
  if (bench.pattern == "none") bench.writers = 0;
  if (bench.dir.empty() || bench.pages == 0 || (bench.writers == 0 && bench.pattern != "none"))
    Fail("see the file's head");
  MakeImage(bench);
  const auto image = unmoor::PageImage::Open(bench.dir);
  if (!image.ok()) Fail(image.status().message());
  auto map = unmoor::DirectMap::Map(*image);
  if (!map.ok()) Fail(map.status().message());
  bench.memory = static_cast<char*>(map->ranges().front().memory.begin);
  bench.aside = Map(bench.pages * kPage);
  std::memset(bench.aside, 1, bench.pages * kPage);
  for (size_t i = 0; i < bench.writers; ++i) {
    bench.states.push_back(std::make_unique<Bench::Writer>());
    bench.states.back()->stored.resize(bench.pages);
  }
  WarmGuest(2 * bench.pages * kPage);
  // Before: the same stores to ordinary memory, as if nothing had ever been checkpointed.
  std::vector<std::thread> writers;
  for (size_t i = 0; i < bench.writers; ++i) writers.emplace_back([&, i] { bench.Write(i); });
  double seconds[3];
  const auto phase_for = [&](int phase, auto work) {
    const auto begin = Clock::now();
    bench.phase = phase;
    work();
    seconds[phase] = std::chrono::duration<double>(Clock::now() - begin).count();
  };
  phase_for(kBefore, [] { std::this_thread::sleep_for(kPhase); });
  Outcome outcome;
  phase_for(kDuring, [&] { outcome = Remap(bench, *map); });
  phase_for(kAfter, [] { std::this_thread::sleep_for(kPhase); });
  bench.phase = kStop;
  for (std::thread& writer : writers) writer.join();
  bench.Verify();
  Report(bench, outcome, seconds);
}
