// A program with a touched heap, to be dumped, restored and remapped by bench/run.
//
// With --threads 0 it sleeps. SIGUSR1: verifies every byte it ever wrote and says so in its report.
// SIGUSR2: writes anew as many pages in 1000, evenly spread, as the --dirty file says.
// With N threads, each sweeps its share of the pages without pause; every page must hold what the
// sweep before wrote there, then is written anew. A page that does not ends the program, and the
// report tells. How many pages were written in each millisecond, and every gap above 0.1 ms, is in
// the timeline file.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <thread>
#include <vector>

#include "report.h"
#include "timeline.h"
#include "words.h"

namespace bench {
namespace {

constexpr size_t kStride = 64;  // a sweep writes every 64th word: 8 cache lines of a page

struct Options {
  size_t mib = 0;
  unsigned threads = 0;
  const char* report = nullptr;
  const char* timeline = nullptr;
  const char* dirty = nullptr;
};

struct Heap {
  uint64_t* words = nullptr;
  size_t pages = 0;
  std::vector<uint8_t> generations;  // of each page; the sleeping program's only
};

[[noreturn]] void Usage() {
  std::fputs(
      "usage: bench_heap --report FILE [--mib N] [--dirty FILE] [--threads N --timeline FILE]\n",
      stderr);
  std::exit(2);
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view name = argv[i];
    const char* value = argv[i + 1];
    if (name == "--mib") {
      options.mib = std::strtoull(value, nullptr, 10);
    } else if (name == "--threads") {
      options.threads = static_cast<unsigned>(std::strtoul(value, nullptr, 10));
    } else if (name == "--report") {
      options.report = value;
    } else if (name == "--dirty") {
      options.dirty = value;
    } else if (name == "--timeline") {
      options.timeline = value;
    } else {
      Usage();
    }
  }
  const bool timed = options.timeline != nullptr;
  if (options.report == nullptr || options.threads > kTimelineThreads ||
      timed != (options.threads > 0)) {
    Usage();
  }
  return options;
}

uint64_t Now() {
  timespec time{};
  clock_gettime(CLOCK_REALTIME, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
}

Heap MakeHeap(size_t mib) {
  Heap heap;
  if (mib == 0) return heap;
  heap.words = MakeWords(mib);
  if (heap.words == nullptr) report::Fail("no memory: %s", std::strerror(errno));
  heap.pages = (mib << 20) / kPage;
  heap.generations.resize(heap.pages);
  return heap;
}

Timeline* OpenTimeline(const Options& options) {
  if (options.timeline == nullptr) return nullptr;
  const int fd = open(options.timeline, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0 || ftruncate(fd, sizeof(Timeline)) != 0) {
    report::Fail("%s: %s", options.timeline, std::strerror(errno));
  }
  void* memory = mmap(nullptr, sizeof(Timeline), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) report::Fail("%s: %s", options.timeline, std::strerror(errno));
  close(fd);
  auto* timeline = static_cast<Timeline*>(memory);
  timeline->begin_ns = Now();
  timeline->threads = options.threads;
  return timeline;
}

class Sweeper {
 public:
  Sweeper(const Heap& heap, Timeline& timeline, size_t thread)
      : heap_(heap), own_(timeline.thread[thread]), begin_ns_(timeline.begin_ns), last_(Now()) {
    first_ = heap.pages * thread / timeline.threads;
    end_ = heap.pages * (thread + 1) / timeline.threads;
  }

  [[noreturn]] void Run() {
    for (uint64_t generation = 1;; ++generation) {
      for (size_t page = first_; page < end_; ++page) {
        Rewrite(page, generation);
        Note();
      }
      ++own_.sweeps;
    }
  }

 private:
  void Rewrite(size_t page, uint64_t generation) {
    for (size_t i = page * kWords; i < (page + 1) * kWords; i += kStride) {
      const uint64_t expected = Word(i, (generation - 1) & 0xff);
      if (heap_.words[i] != expected) {
        report::Fail("page %zu, word %zu: %016llx instead of %016llx", page, i % kWords,
                     static_cast<unsigned long long>(heap_.words[i]),
                     static_cast<unsigned long long>(expected));
      }
      heap_.words[i] = Word(i, generation & 0xff);
    }
  }

  void Note() {
    const uint64_t now = Now();
    const uint64_t milli = (now - begin_ns_) / 1'000'000;
    if (milli < kTimelineMillis) ++own_.pages[milli];
    if (now - last_ > kGapNanos) own_.gaps[own_.gaps_seen++ % kTimelineGaps] = {last_, now - last_};
    last_ = now;
  }

  const Heap& heap_;
  ThreadTimeline& own_;
  const uint64_t begin_ns_;
  uint64_t last_;
  size_t first_ = 0, end_ = 0;
};

void Verify(const Heap& heap) {
  for (size_t i = 0; i < heap.pages * kWords; ++i) {
    const uint64_t expected = Word(i, heap.generations[i / kWords]);
    if (heap.words[i] != expected) {
      report::Fail("page %zu, word %zu: %016llx instead of %016llx", i / kWords, i % kWords,
                   static_cast<unsigned long long>(heap.words[i]),
                   static_cast<unsigned long long>(expected));
    }
  }
}

void Dirty(Heap& heap, const char* path) {
  unsigned thousandths = 0;
  if (std::FILE* const file = std::fopen(path, "re"); file != nullptr) {
    if (std::fscanf(file, "%u", &thousandths) != 1) thousandths = 0;
    std::fclose(file);
  }
  for (size_t page = 0; page < heap.pages; ++page) {
    // Spread: the multiples of 1000 / thousandths.
    if ((page + 1) * thousandths / 1000 == page * thousandths / 1000) continue;
    ++heap.generations[page];
    for (size_t i = page * kWords; i < (page + 1) * kWords; ++i) {
      heap.words[i] = Word(i, heap.generations[page]);
    }
  }
}

[[noreturn]] void Serve(Heap& heap, const Options& options, const sigset_t& wanted) {
  int dirtied = 0;
  for (int verified = 0;;) {
    char text[96];
    std::snprintf(text, sizeof text, "\"ready\": true, \"verified\": %d, \"dirtied\": %d", verified,
                  dirtied);
    report::Write(text);
    int signal = 0;
    if (sigwait(&wanted, &signal) != 0) continue;
    if (signal == SIGUSR2) {
      if (options.dirty != nullptr && options.threads == 0) Dirty(heap, options.dirty);
      ++dirtied;
      continue;
    }
    if (options.threads == 0) Verify(heap);
    ++verified;
  }
}

void Run(const Options& options) {
  report::Open("heap", options.report);
  sigset_t wanted;
  sigemptyset(&wanted);
  sigaddset(&wanted, SIGUSR1);
  sigaddset(&wanted, SIGUSR2);
  sigprocmask(SIG_BLOCK, &wanted, nullptr);
  Heap heap = MakeHeap(options.mib);
  Timeline* timeline = OpenTimeline(options);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < options.threads; ++t) {
    threads.emplace_back([&heap, timeline, t] { Sweeper(heap, *timeline, t).Run(); });
  }
  Serve(heap, options, wanted);
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Run(bench::Parse(argc, argv));
}
