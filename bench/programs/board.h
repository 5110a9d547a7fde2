// How bench/run gives bench_touch its work and takes the results: a file mapped shared by both,
// which survives a restore. bench/served.py knows this layout too (class Touch).
#pragma once

#include <cstdint>

namespace bench {

inline constexpr uint64_t kBoardLatencies = 1 << 20;  // later ones are not noted

enum class Work : uint64_t {
  kTouch = 0,   // read a word of each of `count` pages, noting how long each took
  kVerify = 1,  // every byte
  kReads = 2,   // read `count` words at random places as fast as can be
};

enum class Pattern : uint64_t {
  kSequential = 0,
  kRandom = 1,  // each page once, by `seed`
  kHot = 2,     // nine of ten touches go to one page in ten; pages come again
};

struct Board {
  // Written by bench/run before SIGUSR1.
  Work work;
  Pattern pattern;
  uint64_t threads;
  uint64_t count;  // by all threads together
  uint64_t seed;
  // Written by the program; `done` last: how many pieces of work it has finished.
  uint64_t ready;
  uint64_t elapsed_ns;
  uint64_t wrong;  // words that were not what they must be
  uint64_t noted;
  uint64_t done;
  uint32_t latency_ns[kBoardLatencies];
};

}  // namespace bench
