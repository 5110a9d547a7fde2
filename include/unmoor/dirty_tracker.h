// DirtyTracker: which pages were written since a baseline.
//
//   auto tracker = unmoor::DirtyTracker::Start(ranges);   // the baseline
//   …
//   auto changed = tracker->Changed();                    // exact to the page
//
// By asynchronous write protection (userfaultfd) and PAGEMAP_SCAN: a first write to a page costs a
// fraction of a microsecond in the kernel, system calls' writes count, nobody is signalled. Where
// that is not to be had, by mprotect and a SIGSEGV handler chained before the program's own: then a
// system call that would write to a protected page fails with EFAULT, and only stores are seen:
// what is given back, mapped anew or made writable by the program's own mprotect is not. So
// `mechanism()` should be looked at; Checkpoint does, and makes a full image then.
//
// It keeps counting through a remap. Pages given back (MADV_DONTNEED), unmapped or moved count as
// changed; what is mapped there anew is tracked from the next Reset() on. A child after fork has no
// tracker: Changed() there reports everything.
//
// Methods may be called from any thread, not from signal handlers. Ranges of several trackers must
// not overlap. What is written during a call of Reset() belongs to one side or the
// other, never to none.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "unmoor/memory_range.h"
#include "unmoor/status.h"

namespace unmoor {
inline namespace v1 {

class DirtyTracker {
 public:
  enum class Mechanism { kWriteProtect, kMprotect };

  // Private mappings, anonymous or direct-mapped; page-aligned, disjoint.
  static StatusOr<DirtyTracker> Start(std::span<const MemoryRange> ranges);
  DirtyTracker(DirtyTracker&&) noexcept;
  DirtyTracker& operator=(DirtyTracker&&) noexcept;
  ~DirtyTracker();

  // Pages written (or given back) since the baseline, ascending, joined.
  [[nodiscard]] StatusOr<std::vector<MemoryRange>> Changed() const;
  // Forgets: a new baseline. What was changed until then is returned.
  StatusOr<std::vector<MemoryRange>> Reset();
  [[nodiscard]] Mechanism mechanism() const;

  class Impl;
  [[nodiscard]] Impl& impl() const { return *impl_; }

 private:
  explicit DirtyTracker(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace v1
}  // namespace unmoor
