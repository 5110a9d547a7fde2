// LazyJournal: what has happened to a lazy restore, in memory that outlives whoever serves it.
//
// The server writes, its keeper reads once the server has died: what is still to be brought follows
// from the image and the records alone. A record is complete before it counts. Between reading an
// event and recording it nothing may be lost: BeginReading and EndReading say so, and a server that
// died between them cannot be followed by another. Single writer; no locks, no allocation.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

struct LazyRecord {
  enum class Kind : uint32_t {
    kCriu,       // pid: the criu at work
    kTask,       // uffd: of the task `vpid`, as criu handed it over
    kAdopted,    // pid: the restored task `vpid`
    kRunning,    // the program runs
    kForked,     // uffd: of a child born to the one of `parent_uffd`
    kGivenBack,  // uffd: range
    kMoved,      // uffd: range, to
    kClosed,     // uffd: it needs nothing more
    kFinished,   // nobody needs anything more
  } kind = Kind::kFinished;
  int32_t uffd = -1;
  int32_t parent_uffd = -1;
  int32_t pid = 0;
  uint32_t vpid = 0;
  uint32_t stay_stopped = 0;  // of kAdopted: was stopped already when dumped
  VaddrRange range = {};
  Vaddr to = {};
};

class LazyJournal {
 public:
  [[nodiscard]] static Result<LazyJournal> Create();

  void Append(const LazyRecord& record);
  [[nodiscard]] std::span<const LazyRecord> records() const;

  void BeginReading() { header_->reading.store(1, std::memory_order_relaxed); }
  void EndReading() { header_->reading.store(0, std::memory_order_release); }
  // Nothing is missing in it.
  [[nodiscard]] bool whole() const;

 private:
  struct Header {
    std::atomic<uint64_t> count;
    std::atomic<uint32_t> reading;
    std::atomic<uint32_t> full;
  };
  LazyJournal(Header* header, std::span<LazyRecord> room) : header_(header), room_(room) {}

  Header* header_;
  std::span<LazyRecord> room_;
};

}  // namespace unmoor
