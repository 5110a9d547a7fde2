// What the benchmarks' programs keep in their heaps: no two words are alike, so a page that is
// lost, torn or at another place is seen.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bench {

inline constexpr size_t kPage = 4096;
inline constexpr size_t kWords = kPage / sizeof(uint64_t);

inline uint64_t Word(size_t index, uint64_t generation) {
  uint64_t x = (index + 1) * 0x9E3779B97F4A7C15u ^ generation << 56;
  x ^= x >> 29;
  return x * 0xBF58476D1CE4E5B9u;
}

}  // namespace bench
