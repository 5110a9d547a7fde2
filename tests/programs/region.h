// A range of memory whose every page has an expected content.
//
// What is expected is kept in shared anonymous memory (the ledger), which CRIU restores itself and
// which is never direct-mapped nor remapped: it can't lose a write together with the page it is
// about. Each thread owns its pages; a region and its ledger have no locks.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "pages.h"
#include "report.h"

inline void* MapAnonymous(void* at, size_t bytes, int protection, int flags) {
  void* memory = mmap(at, bytes, protection, MAP_ANONYMOUS | flags, -1, 0);
  if (memory == MAP_FAILED) {
    report::Fail("mmap of %zu bytes: %s", bytes, std::strerror(errno));
  }
  return memory;
}

class Region {
 public:
  // The numbers of its pages begin at `first_number`, so that no page passes for another one's.
  // A PROT_NONE page on both sides keeps it a VMA of its own.
  // It may grow up to `most_pages` (MovedTo). It lies at `place` where one is given.
  Region(size_t page_count, uint64_t first_number, size_t most_pages = 0, void* place = nullptr)
      : count_(page_count), first_(first_number) {
    if (most_pages < page_count) most_pages = page_count;
    auto* reserved = static_cast<char*>(
        MapAnonymous(place, (page_count + 2) * pages::kSize, PROT_NONE, MAP_PRIVATE));
    base_ = reinterpret_cast<uint64_t*>(reserved + pages::kSize);
    if (mprotect(base_, page_count * pages::kSize, PROT_READ | PROT_WRITE) != 0) {
      report::Fail("mprotect: %s", std::strerror(errno));
    }
    ledger_ = static_cast<uint64_t*>(
        MapAnonymous(nullptr, most_pages * sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED));
  }

  size_t count() const { return count_; }
  uint64_t* Page(size_t i) const { return base_ + i * pages::kWords; }
  void* Address(size_t i) const { return Page(i); }

  // The last sequence number written to page `i`; kept when the page is zeroed.
  uint64_t Sequence(size_t i) const { return ledger_[i] & ~kZeroed; }
  bool ExpectedZero(size_t i) const { return ledger_[i] == 0 || (ledger_[i] & kZeroed) != 0; }
  // The sequence number the page itself must show: 0 when it is to be zero.
  uint64_t Shown(size_t i) const { return ExpectedZero(i) ? 0 : Sequence(i); }

  void Write(size_t i) {
    const uint64_t sequence = Sequence(i) + 1;
    pages::Fill(Page(i), first_ + i, sequence);
    ledger_[i] = sequence;
  }
  void WriteRange(size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) Write(i);
  }

  // The program did something after which pages [begin, end) must read zero.
  void ExpectZero(size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) ledger_[i] |= kZeroed;
  }

  // Ends the program when page `i` is not what it should be; `when` says after what.
  void Check(size_t i, const char* when) const {
    const uint64_t* page = Page(i);
    if (ExpectedZero(i) ? pages::IsZero(page) : pages::Holds(page, first_ + i, Sequence(i))) return;
    FailOn(i, page, when);
  }
  void CheckRange(size_t begin, size_t end, const char* when) const {
    for (size_t i = begin; i < end; ++i) Check(i, when);
  }
  // After MADV_FREE, until it is written. The kernel may free the page while it is looked at, and
  // then it stays zero: so whether it is zero is asked last.
  void CheckUnlessFreed(size_t i, const char* when) const {
    const uint64_t* page = Page(i);
    if (pages::Holds(page, first_ + i, Sequence(i)) && !ExpectedZero(i)) return;
    if (!pages::IsZero(page)) FailOn(i, page, when);
  }

  // For a forked child, whose ledger the parent goes on changing: the page must be whole, or zero.
  // Returns the sequence number it shows.
  uint64_t CheckWhole(size_t i, const char* when) const {
    const uint64_t* page = Page(i);
    if (pages::IsZero(page)) return 0;
    if (!pages::Holds(page, first_ + i, page[0])) FailOn(i, page, when);
    return page[0];
  }
  void WriteInChild(size_t i, uint64_t sequence) const {
    pages::Fill(Page(i), first_ + i, sequence);
  }
  bool HoldsInChild(size_t i, uint64_t sequence) const {
    return pages::Holds(Page(i), first_ + i, sequence);
  }

  // After mremap.
  void MovedTo(void* base, size_t page_count) {
    base_ = static_cast<uint64_t*>(base);
    count_ = page_count;
  }

 private:
  static constexpr uint64_t kZeroed = uint64_t{1} << 63;

  [[noreturn]] void FailOn(size_t i, const uint64_t* page, const char* when) const {
    char what[256];
    pages::Describe(page, first_ + i, Shown(i), what, sizeof what);
    if (ExpectedZero(i)) {
      report::Fail("page %zu at %p (%s) must be zero (last write %llu) but %s", i,
                   static_cast<const void*>(page), when, (unsigned long long)Sequence(i), what);
    }
    report::Fail("page %zu at %p (%s) must hold write %llu but %s", i,
                 static_cast<const void*>(page), when, (unsigned long long)Sequence(i), what);
  }

  uint64_t* base_ = nullptr;
  uint64_t* ledger_ = nullptr;
  size_t count_;
  uint64_t first_;
};

// xorshift64*: each thread its own.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(pages::Mix(seed) | 1) {}
  uint64_t Next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1d;
  }
  size_t Below(size_t bound) { return static_cast<size_t>(Next() % bound); }
  bool OneIn(size_t n) { return Below(n) == 0; }

 private:
  uint64_t state_;
};
