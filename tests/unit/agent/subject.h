// Programs under test: forked children of the test that map a page image and check what they read.
//
// The test and its subject share one page of memory (Signals) and tell each other through it what
// has happened; both wait on conditions, never for a time. Memory is checked page by page: a page
// of the image says which page it is, a page written says how often.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/units.h"

namespace unmoor::testing_agent {

// One page, shared by a test and its subject.
struct Signals {
  std::atomic<int> ready{0};   // subject: how far it is
  std::atomic<int> go{0};      // test: how far the subject may go
  std::atomic<int> errors{0};  // subject: what it found wrong
  std::atomic<int> interrupted{0};
  std::atomic<int> child{0};
  std::atomic<uint64_t> address{0};  // of the subject's memory
  std::atomic<uint64_t> laps{0};
  char first_error[512] = {};

  void Fail(const std::string& what);
};

// True once `condition` holds; false when it does not within some seconds.
bool WaitUntil(const std::function<bool()>& condition, Nanos limit = Nanos(60'000'000'000));

// A page image <directory>/layers/a.pages of `pages` pages with content and a gap after them. Every
// eighth page is a hole.
struct PageImage {
  std::string path;
  uint64_t pages = 0;
};
PageImage MakePageImage(const std::string& directory, uint64_t pages);
// The same as a layer with an index, in the same place.
PageImage MakeLayer(const std::string& directory, uint64_t pages);
uint64_t ImageWord(uint64_t page);  // what each word of that page holds

// Memory mapped from a page image, and what the program that uses it expects to read there.
class Memory {
 public:
  // With inaccessible pages before and behind, so that nothing else joins it.
  Memory(const PageImage& image, Signals& signals);

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] std::byte* At(uint64_t page) const { return data_ + page * kPageSize; }
  [[nodiscard]] uint64_t pages() const { return expected_.size(); }

  void Check(uint64_t page, const char* when);
  void CheckAll(const char* when);
  void Write(uint64_t page);
  void GiveBack(uint64_t page, uint64_t count, int advice);
  // munmap of what is behind its first `pages`; mremap that brings the rest back, zero:
  // in place, unless something has been mapped there meanwhile.
  void Shorten(uint64_t pages);
  void GrowAgain(uint64_t from);
  // After the program changed the memory by other means.
  void Expect(uint64_t page, uint64_t word) { expected_[page] = word; }
  // After mremap.
  void MovedTo(std::byte* data) { data_ = data; }
  // Check, write and perhaps give back every page p with p % of == turn, once.
  void Lap(uint64_t turn, uint64_t of, bool give_back);

 private:
  Signals& signals_;
  std::byte* data_ = nullptr;
  std::vector<uint64_t> expected_;
  std::atomic<uint64_t> next_{1};
};

}  // namespace unmoor::testing_agent
