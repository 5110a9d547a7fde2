// A program and its memory, simulated page by page, for tests of the batch state machine.
//
// It behaves as the kernel and the program do in what matters to a remap: pages come from an image
// until written; written pages are known since a baseline; giving memory back, unmapping and moving
// make an event, and the thread waits in its system call until that is read; a thread whose event
// was read finishes its call only later. Beside the memory a reference is kept of what a program
// with plain anonymous memory would see. The threads are free of data races: none touches what
// another is giving back at that moment.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "os/procfs.h"

namespace unmoor::simulation {

// Pages are named by number: address / kPageSize.
struct PageRange {
  uint64_t begin = 0;
  uint64_t end = 0;
  [[nodiscard]] bool Contains(uint64_t page) const { return begin <= page && page < end; }
  [[nodiscard]] bool Overlaps(PageRange o) const { return begin < o.end && o.begin < end; }
};

struct Action {
  enum class Kind {
    kWrite,     // the first page of `pages`
    kGiveBack,  // MADV_DONTNEED
    kUnmap,
    kMapOver,  // fresh anonymous memory at the same place
    kProtect,  // write access off or, where off, on
    kMove,     // mremap to page `to`
  } kind = Kind::kWrite;
  PageRange pages;
  int thread = 0;
  int late = 0;     // kGiveBack: so many steps after its event was read it takes effect
  uint64_t to = 0;  // kMove
};
[[nodiscard]] std::string ToString(const Action& action);

struct Page {
  bool image = false;
  uint64_t file_page = 0;
  std::optional<uint64_t> own;  // content of the process's own
  bool written = false;         // since the last baseline
  bool watched = false;         // registered with userfaultfd
  bool read_only = false;
};

struct Event {
  Action::Kind kind;
  PageRange pages;
  int thread;
};

class Program {
 public:
  // `image[n]` is what page n of the page image holds; 0: a hole, or zeros.
  explicit Program(std::vector<uint64_t> image) : image_(std::move(image)) {}
  void MapImage(PageRange pages, uint64_t file_page);

  enum class Outcome { kDone, kBlocked, kImpossible };
  Outcome Do(const Action& action);
  // One step of time: calls whose event was read come to their end, some later than others.
  void Step();
  // Every thread stops at the end of its system call, if that does not wait for an event.
  void StopThreads();

  // What was wrong first, compared with the reference; empty: nothing so far.
  void Compare();
  [[nodiscard]] const std::string& violation() const { return violation_; }

  // For the carrier.
  [[nodiscard]] std::map<uint64_t, Page>& pages() { return pages_; }
  [[nodiscard]] uint64_t View(const Page& page) const;
  [[nodiscard]] uint64_t ImagePage(uint64_t file_page) const;
  [[nodiscard]] size_t image_size() const { return image_.size(); }
  [[nodiscard]] const std::deque<Event>& events() const { return events_; }
  Event ReadEvent();
  [[nodiscard]] std::vector<VmaInfo> Vmas() const;
  [[nodiscard]] bool MapsImage() const;

 private:
  struct Call {  // of a thread inside a system call
    Action action;
    bool waits = true;  // for its event to be read
    int late = 0;
  };
  [[nodiscard]] bool AllMapped(PageRange range) const;
  [[nodiscard]] bool AnyWatched(PageRange range) const;
  void GiveBack(PageRange range);
  void Unmap(PageRange range);
  void Move(PageRange range, uint64_t to);

  std::vector<uint64_t> image_;
  std::map<uint64_t, Page> pages_;
  struct Expected {
    uint64_t value = 0;
    bool read_only = false;
  };
  std::map<uint64_t, Expected> reference_;
  std::deque<Event> events_;
  std::vector<Call> calls_;
  uint64_t next_value_ = 1'000'000;
  std::string violation_;
};

}  // namespace unmoor::simulation
