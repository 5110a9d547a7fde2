// Self-checking page contents, for the programs under test.
//
// Every word of a page follows from the page's number and a sequence number, so a page tells which
// write it holds, and a page put together from two writes, or from another page, is seen. The word
// 0 and the last one hold the sequence number itself, word 1 the page's number.
//
// No allocation and no locks: forked children and signal handlers use it too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace pages {

inline constexpr size_t kSize = 4096;
inline constexpr size_t kWords = kSize / sizeof(uint64_t);
inline constexpr uint64_t kMagic = 0x756e6d6f6f720000;
inline constexpr uint64_t kStep = 0x9e3779b97f4a7c15;

inline uint64_t Mix(uint64_t x) {
  x += kStep;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

inline uint64_t BaseOf(uint64_t number, uint64_t sequence) {
  return Mix(Mix(number) ^ sequence);
}

inline void Fill(uint64_t* page, uint64_t number, uint64_t sequence) {
  const uint64_t base = BaseOf(number, sequence);
  page[0] = sequence;
  page[1] = number ^ kMagic;
  for (size_t i = 2; i < kWords - 1; ++i) page[i] = base + i * kStep;
  page[kWords - 1] = sequence;
}

inline bool Holds(const uint64_t* page, uint64_t number, uint64_t sequence) {
  const uint64_t base = BaseOf(number, sequence);
  uint64_t differing = (page[0] ^ sequence) | (page[1] ^ number ^ kMagic);
  for (size_t i = 2; i < kWords - 1; ++i) differing |= page[i] ^ (base + i * kStep);
  return (differing | (page[kWords - 1] ^ sequence)) == 0;
}

inline bool IsZero(const uint64_t* page) {
  uint64_t any = 0;
  for (size_t i = 0; i < kWords; ++i) any |= page[i];
  return any == 0;
}

// What a page that should hold `sequence` holds instead, as one line.
inline void Describe(const uint64_t* page, uint64_t number, uint64_t sequence, char* out,
                     size_t size) {
  if (IsZero(page)) {
    std::snprintf(out, size, "is zero");
  } else if (page[0] != sequence && Holds(page, number, page[0])) {
    std::snprintf(out, size, "holds the whole write %llu: %s", (unsigned long long)page[0],
                  page[0] < sequence ? "a write was lost" : "a later write");
  } else if ((page[1] ^ kMagic) != number && Holds(page, page[1] ^ kMagic, page[0])) {
    std::snprintf(out, size, "is page %llu, write %llu", (unsigned long long)(page[1] ^ kMagic),
                  (unsigned long long)page[0]);
  } else {
    const uint64_t base = BaseOf(number, sequence);
    size_t bad = 0, first = 0;
    for (size_t i = 2; i < kWords - 1; ++i) {
      if (page[i] == base + i * kStep) continue;
      if (bad++ == 0) first = i;
    }
    std::snprintf(out, size,
                  "is torn: first word says write %llu, last word %llu, %zu words in between "
                  "differ, the first at %zu (0x%llx)",
                  (unsigned long long)page[0], (unsigned long long)page[kWords - 1], bad, first,
                  (unsigned long long)page[first]);
  }
}

}  // namespace pages
