// BackgroundRemapper: moves direct-mapped memory to anonymous memory while the program runs on it.
//
//   auto map = unmoor::DirectMap::Map(*image);
//   auto remapper = unmoor::BackgroundRemapper::Start(*map);
//   …                                                // read and write the memory as you like
//   remapper->Wait(std::chrono::minutes(1));         // ok: nothing needs the image any more
//
// The addresses, protections and bytes stay the same; no write is lost, torn or repeated. A batch
// is copied while the program runs; only for the moment in which pages written meanwhile are copied
// again and the copy takes the old memory's place must nobody write. Who waits in that moment is
// the guard's affair:
//
//   kFreeze  every thread of the process, for a bounded moment, in the handler of a signal. A
//   thread in
//            there is in no system call and writes nothing, so nothing can be lost: not by read(2),
//            futexes, signal stacks, nor thread ends. Needs no privileges. As after any signal,
//            epoll_wait, nanosleep, sigtimedwait and their kin may return EINTR (signal(7)).
//   kFault   only threads that write to the piece (at most 2 MiB) being swapped, in a SIGSEGV
//   handler
//            chained before the program's own. Used for ranges declared so; see RemapRange.
//
// While memory is direct-mapped and a remapper exists (started, paused or refused), MADV_DONTNEED
// and MADV_FREE of it give zeros, and munmap, mmap over it, mprotect and mremap work, as on
// anonymous memory. Exceptions are listed in docs/guarantees.md.
//
// fork: the child has right memory, in part still direct-mapped, and no remapper: every remapper is
// at rest in it (progress() says kLater) and it may start one of its own. fork() takes no part in a
// window: it waits for one that is open (at most some milliseconds) and none opens during it. A
// child made by a bare clone system call that inherited a guarded range is given its protection
// back by the handler at its first write.
//
// Any number of remappers may exist, of disjoint ranges. Every method may be called from any
// thread, but not from a signal handler.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "unmoor/memory_range.h"
#include "unmoor/status.h"

namespace unmoor {
inline namespace v1 {

class DirectMap;
class DirtyTracker;

enum class Guard {
  kFreeze,  // safe for every program
  kFault,   // for ranges with RemapRange::written_by_system_calls == false; kFreeze for the others
};

enum class RemapOrder {
  kGiven,       // the ranges in the order given, each by ascending address
  kSequential,  // by ascending address
  kHotFirst,    // what the program has written most, first
};

// Whether this memory, or the process, can do without the image.
enum class RemapStatus {
  kNever = 0,  // part of it cannot be remapped: the reason says which range and why
  kLater = 1,  // still direct-mapped
  kReady = 2,
};

struct RemapRange {
  MemoryRange memory;
  // False is the caller's promise, for as long as this is direct-mapped: no system call writes here
  // or changes the mapping (munmap, mremap, mprotect, madvise) and no thread writes here with
  // SIGSEGV blocked. kFault relies on it; kFreeze does not care. Where a thread's stack, alternate
  // signal stack or thread-local storage is found in the range, kFreeze is used in any case.
  bool written_by_system_calls = true;
};

struct RemapOptions {
  int threads = 1;                // that copy
  uint64_t bytes_per_second = 0;  // 0: as fast as it goes
  double cpu_share = 1.0;         // of one core, for each thread; (0, 1]
  Guard guard = Guard::kFreeze;
  std::chrono::nanoseconds max_pause = std::chrono::milliseconds(1);  // aimed at, for a window
  RemapOrder order = RemapOrder::kGiven;
  bool huge_pages = true;  // for full 2 MiB blocks, unless the system's setting is "never"
  bool verify = true;      // compare what is read from the image with its hashes
  // 0: a signal the C library keeps to itself (33 with glibc). Another must be one the program
  // neither blocks nor handles.
  int freeze_signal = 0;
  int completion_eventfd = -1;  // written to (1) when on_complete would be called; stays yours
  // Called once, from a thread of the remapper, when it has come to its end: kReady, kNever (all
  // the rest is done), or cancelled (kLater). Must not destroy the remapper.
  std::function<void(RemapStatus)> on_complete;
  // Told of every write that the remap would make it forget; must outlive the remapper.
  DirtyTracker* tracker = nullptr;
};

struct RemapProgress {
  RemapStatus status = RemapStatus::kLater;
  // kNever: which range, file and offset, and why. kLater and standing still: why.
  std::string reason;
  bool running = false;        // false: paused, standing still, cancelled or at the end
  uint64_t total_bytes = 0;    // of the image's data in the ranges
  uint64_t done_bytes = 0;     // of these, anonymous now
  uint64_t refused_bytes = 0;  // of these, never to be: damaged in the image
  uint64_t windows = 0;        // moments in which a guard was up and a batch was swapped
  uint64_t aborted = 0;        // … and given up without effect: tried again later
  uint64_t faults_caught = 0;  // writes that waited for kFault
  std::chrono::nanoseconds longest_pause{};   // of all threads (kFreeze)
  std::chrono::nanoseconds longest_guard{};   // of one piece (kFault)
  std::chrono::nanoseconds writers_waited{};  // sum over faults_caught
};

class BackgroundRemapper {
 public:
  // Ranges that map no image are done at once. kInvalidArgument: unaligned, empty or overlapping
  // ranges, or some that another remapper has; an option out of its bounds. kUnsupported: the
  // kernel lacks userfaultfd's asynchronous write protection or PAGEMAP_SCAN (6.7), PROCMAP_QUERY
  // (6.11).
  static StatusOr<BackgroundRemapper> Start(std::span<const RemapRange> ranges,
                                            const RemapOptions& options = {});
  // All of the map's ranges. `map` may be Released, but not unmapped, before the remapper ends.
  static StatusOr<BackgroundRemapper> Start(const DirectMap& map, const RemapOptions& options = {});
  // Chosen parts of a map, or all of it with other promises than the default.
  static StatusOr<BackgroundRemapper> Start(const DirectMap& map,
                                            std::span<const RemapRange> ranges,
                                            const RemapOptions& options = {});

  BackgroundRemapper(BackgroundRemapper&&) noexcept;
  BackgroundRemapper& operator=(BackgroundRemapper&&) noexcept;
  // Cancels and waits for the remapper's threads (milliseconds).
  ~BackgroundRemapper();

  [[nodiscard]] RemapProgress progress() const;

  // Until there is nothing left to wait for, or `timeout` (negative: none) has passed: kTimedOut.
  // Ok: kReady. kDamaged: kNever, with the reason. kBusy, kNoMemory, kSystem: standing still with
  // that reason until Resume() or FinishNow(). kCancelled.
  Status Wait(std::chrono::nanoseconds timeout = std::chrono::nanoseconds(-1));

  void Pause();      // after the batch under way; everything stays as it is meanwhile
  void Resume();     // also when standing still: try again
  void FinishNow();  // Resume, and from here on without a pace
  void Cancel();     // for good; what is done stays done. Wait() tells when it has come to rest.

 private:
  class Impl;
  explicit BackgroundRemapper(std::unique_ptr<Impl> impl);
  static StatusOr<BackgroundRemapper> StartWith(std::span<const RemapRange> ranges,
                                                const DirectMap* map, const RemapOptions& options);
  std::unique_ptr<Impl> impl_;
};

// Of the whole process, whoever direct-mapped it: kReady when no mapping is of a page image.
struct ProcessStatus {
  RemapStatus status = RemapStatus::kReady;
  std::string reason;                // empty when kReady
  uint64_t direct_mapped_bytes = 0;  // address space that still maps an image
};
StatusOr<ProcessStatus> QueryStatus();

}  // namespace v1
}  // namespace unmoor
