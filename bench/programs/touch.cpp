// A program whose heap is read as bench/run says, by way of a board in shared memory (board.h): how
// long each first touch of a page takes after a restore, how fast all memory is read later, and
// whether every byte is right.
//
// bench_touch --mib N --board FILE [--of K]. SIGUSR1: do what the board says. Each word read is
// compared with what was written at the start; a wrong one is counted on the board, and bench/run
// fails. With --of, one page of K is written, the others are never touched before they are asked
// for: a heap may then be larger than memory and disk. Of these, each that is behind a written one
// is compared too.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string_view>
#include <thread>
#include <vector>

#include "board.h"
#include "words.h"

namespace bench {
namespace {

struct Options {
  size_t mib = 0;
  size_t of = 1;
  const char* board = nullptr;
};

struct Heap {
  const uint64_t* words = nullptr;
  size_t pages = 0;
  size_t of = 1;

  uint64_t Expected(size_t word) const { return word / kWords % of == 0 ? Word(word, 0) : 0; }
};

[[noreturn]] void Die(const char* what) {
  std::fprintf(stderr, "bench_touch: %s: %s\n", what, std::strerror(errno));
  std::exit(1);
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view name = argv[i];
    if (name == "--mib") {
      options.mib = std::strtoull(argv[i + 1], nullptr, 10);
    } else if (name == "--of") {
      options.of = std::strtoull(argv[i + 1], nullptr, 10);
    } else if (name == "--board") {
      options.board = argv[i + 1];
    }
  }
  if (options.board == nullptr || options.of == 0) {
    std::fputs("usage: bench_touch --mib N --board FILE [--of K]\n", stderr);
    std::exit(2);
  }
  return options;
}

uint64_t Now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
}

Heap MakeHeap(size_t mib, size_t of) {
  if (mib == 0) return {};
  const uint64_t* words = MakeWords(mib, of);
  if (words == nullptr) Die("no memory");
  return {words, (mib << 20) / kPage, of};
}

Board& OpenBoard(const char* path) {
  const int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0 || ftruncate(fd, sizeof(Board)) != 0) Die(path);
  void* memory = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) Die(path);
  close(fd);
  return *static_cast<Board*>(memory);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t Below(uint64_t limit) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ % limit;
  }

 private:
  uint64_t state_;
};

// The pages that all threads together touch, in order; thread t takes its part of the list. Nothing
// of the heap's size is allocated: the first answer of a large program must not cost more.
std::vector<uint32_t> PagesToTouch(const Heap& heap, const Board& board) {
  const uint64_t all = heap.pages;
  if (all == 0) return {};
  Random random(board.seed);
  // i → (i × step + first) mod all visits each page once.
  uint64_t step = 1;
  uint64_t first = 0;
  if (board.pattern != Pattern::kSequential) {
    do step = random.Below(all) | 1;
    while (std::gcd(step, all) != 1);
    first = random.Below(all);
  }
  const auto page = [&](uint64_t i) { return static_cast<uint32_t>((i * step + first) % all); };
  std::vector<uint32_t> pages;
  const bool hot = board.pattern == Pattern::kHot;
  const uint64_t count = hot ? board.count : std::min(board.count, all);
  pages.reserve(count);
  for (uint64_t i = 0; i < count; ++i) {
    pages.push_back(page(hot ? random.Below(random.Below(10) != 0 ? all / 10 + 1 : all) : i));
  }
  return pages;
}

class Task {
 public:
  Task(const Heap& heap, Board& board) : heap_(heap), board_(board) {}

  void Run() {
    std::vector<uint32_t> pages;
    std::vector<uint32_t> latencies;
    if (board_.work == Work::kTouch) pages = PagesToTouch(heap_, board_);
    latencies.resize(pages.size());  // touched here, not while it counts
    const uint64_t threads = std::max<uint64_t>(board_.threads, 1);
    const uint64_t begin = Now();
    std::vector<std::thread> others;
    for (uint64_t t = 1; t < threads; ++t) {
      others.emplace_back([&, t] { Part(t, threads, pages, latencies); });
    }
    Part(0, threads, pages, latencies);
    for (std::thread& other : others) other.join();
    board_.elapsed_ns = Now() - begin;
    board_.noted = std::min<uint64_t>(latencies.size(), kBoardLatencies);
    if (board_.noted != 0) {
      std::memcpy(board_.latency_ns, latencies.data(), board_.noted * sizeof(uint32_t));
    }
    board_.wrong = wrong_;
  }

 private:
  void Part(uint64_t thread, uint64_t threads, const std::vector<uint32_t>& pages,
            std::vector<uint32_t>& latencies) {
    const auto from = [&](uint64_t all) { return all * thread / threads; };
    const auto to = [&](uint64_t all) { return all * (thread + 1) / threads; };
    uint64_t wrong = 0;
    if (board_.work == Work::kTouch) {
      for (uint64_t i = from(pages.size()); i < to(pages.size()); ++i) {
        const size_t word = pages[i] * kWords + 17;
        const uint64_t before = Now();
        const uint64_t found = *static_cast<const volatile uint64_t*>(&heap_.words[word]);
        latencies[i] = static_cast<uint32_t>(std::min<uint64_t>(Now() - before, UINT32_MAX));
        if (found != heap_.Expected(word)) ++wrong;
      }
    } else if (board_.work == Work::kVerify) {
      for (size_t page = from(heap_.pages); page < to(heap_.pages); ++page) {
        if (page % heap_.of > 1) continue;
        for (size_t i = page * kWords; i < (page + 1) * kWords; ++i) {
          if (heap_.words[i] != heap_.Expected(i)) ++wrong;
        }
      }
    } else if (heap_.pages != 0) {
      Random random(board_.seed + thread);
      for (uint64_t i = from(board_.count); i < to(board_.count); ++i) {
        const size_t word = random.Below(heap_.pages * kWords);
        if (heap_.words[word] != heap_.Expected(word)) ++wrong;
      }
    }
    wrong_ += wrong;
  }

  const Heap& heap_;
  Board& board_;
  std::atomic<uint64_t> wrong_ = 0;
};

[[noreturn]] void Serve(const Options& options) {
  sigset_t wanted;
  sigemptyset(&wanted);
  sigaddset(&wanted, SIGUSR1);
  sigprocmask(SIG_BLOCK, &wanted, nullptr);
  const Heap heap = MakeHeap(options.mib, options.of);
  Board& board = OpenBoard(options.board);
  std::atomic_ref<uint64_t>(board.ready) = 1;
  for (;;) {
    int signal = 0;
    if (sigwait(&wanted, &signal) != 0) continue;
    Task(heap, board).Run();
    ++std::atomic_ref<uint64_t>(board.done);
  }
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Serve(bench::Parse(argc, argv));
}
