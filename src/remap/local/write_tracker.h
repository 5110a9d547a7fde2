// WriteTracker: which pages of chosen ranges were written since a baseline, kept through a remap.
//
// Asynchronous write protection where it is to be had: the kernel marks pages as they are written,
// and whoever makes it forget (the remapper's own baselines, a swap, memory given back) notes what
// was marked in our bits first (window.h, NoteWritten). Otherwise protection and the SIGSEGV
// handler (fault_guard.h), which set the bits themselves.
//
// Thread-safe. In a forked child it knows nothing: everything counts as written.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "remap/local/watcher.h"

namespace unmoor::local {

class WriteTracker {
 public:
  // Page-aligned, disjoint, not empty. `by_protection`: the fall-back even where it is not needed.
  [[nodiscard]] static Result<std::unique_ptr<WriteTracker>> Start(
      std::span<const VaddrRange> ranges, bool by_protection);
  ~WriteTracker();
  WriteTracker(const WriteTracker&) = delete;
  WriteTracker& operator=(const WriteTracker&) = delete;

  // Written since the baseline; a new baseline with `reset`.
  [[nodiscard]] Result<std::vector<VaddrRange>> Written(bool reset);
  [[nodiscard]] bool IsOfThisProcess() const;
  [[nodiscard]] bool by_protection() const { return watcher_ == nullptr; }

 private:
  struct Tracked {
    VaddrRange range;
    int prot = 0;  // by_protection: what it had
    std::vector<uint64_t> bits;
  };
  WriteTracker() = default;
  [[nodiscard]] Result<> Begin(std::span<const VaddrRange> ranges);
  [[nodiscard]] Result<> WatchRanges();
  [[nodiscard]] Result<> ProtectRanges();
  void WatchNewParts(VaddrRange range);

  int owner_ = 0;
  std::shared_ptr<Watcher> watcher_;
  Fd maps_;  // by_protection
  std::mutex mutex_;
  std::vector<Tracked> tracked_;
};

}  // namespace unmoor::local
