// What the benchmarks' programs keep in their heaps: no two words are alike, so a page that is
// lost, torn or at another place is seen.
#pragma once

#include <sys/mman.h>

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

// A heap full of words of generation 0, or with one page of so many full of them; null: no memory.
inline uint64_t* MakeWords(size_t mib, size_t of = 1) {
  void* memory =
      mmap(nullptr, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  auto* words = static_cast<uint64_t*>(memory);
  for (size_t page = 0; page < (mib << 20) / kPage; page += of) {
    for (size_t i = page * kWords; i < (page + 1) * kWords; ++i) words[i] = Word(i, 0);
  }
  return words;
}

}  // namespace bench
