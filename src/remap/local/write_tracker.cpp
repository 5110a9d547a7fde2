// See write_tracker.h.
#include "remap/local/write_tracker.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "os/file.h"
#include "os/own_process.h"
#include "os/pagemap.h"
#include "os/process_control.h"
#include "remap/local/fault_guard.h"

namespace unmoor::local {
namespace {

// The range is one mapping, private.
Result<int> ProtectionOf(int maps, VaddrRange range) {
  UNMOOR_ASSIGN(const auto vma, QueryVma(maps, range.begin));
  if (!vma || vma->range.begin > range.begin || vma->range.end < range.end || vma->shared) {
    return UserError("memory {} is not one private mapping", range);
  }
  return vma->prot;
}

void AppendBits(const std::vector<uint64_t>& bits, VaddrRange range,
                std::vector<VaddrRange>& found) {
  const uint64_t pages = ToPages(range.size()).value;
  for (uint64_t page = 0; page < pages; ++page) {
    if (page % 64 == 0 && bits[page / 64] == 0) {
      page += 63;
      continue;
    }
    if ((bits[page / 64] >> (page % 64) & 1) == 0) continue;
    const Vaddr at = range.begin + Bytes(page * kPageSize);
    if (!found.empty() && found.back().end == at) {
      found.back().end = at + Bytes(kPageSize);
    } else {
      found.push_back({at, at + Bytes(kPageSize)});
    }
  }
}

}  // namespace

Result<std::unique_ptr<WriteTracker>> WriteTracker::Start(std::span<const VaddrRange> ranges,
                                                          bool by_protection) {
  std::unique_ptr<WriteTracker> tracker(new WriteTracker);
  tracker->owner_ = OwnPid().value;
  if (!by_protection) {
    auto watcher = Watcher::Get(0);
    if (watcher) tracker->watcher_ = std::move(*watcher);
  }
  UNMOOR_TRY(tracker->Begin(ranges));
  return tracker;
}

Result<> WriteTracker::Begin(std::span<const VaddrRange> ranges) {
  for (const VaddrRange range : ranges) {
    Tracked tracked;
    tracked.range = range;
    tracked.bits.resize((ToPages(range.size()).value + 63) / 64);
    tracked_.push_back(std::move(tracked));
  }
  return by_protection() ? ProtectRanges() : WatchRanges();
}

Result<> WriteTracker::WatchRanges() {
  for (Tracked& tracked : tracked_) {
    locks.address_space.Acquire();
    const bool room =
        AddTracked(tracked.range.begin.value, tracked.range.end.value, tracked.bits.data());
    locks.address_space.Release();
    if (!room) return UserError("too many tracked ranges");
    UNMOOR_TRY(watcher_->Watch(tracked.range));
  }
  UNMOOR_TRY(Written(true));
  return {};
}

// What was mapped over the range since. A part that cannot be watched reads as written at once.
void WriteTracker::WatchNewParts(VaddrRange range) {
  for (Vaddr at = range.begin; at < range.end;) {
    const auto vma = QueryVma(watcher_->fds().maps, at);
    if (!vma || !*vma || (*vma)->range.begin >= range.end) return;
    (void)watcher_->Watch((*vma)->range.Intersect(range));
    at = (*vma)->range.end;
  }
}

Result<> WriteTracker::ProtectRanges() {
  UNMOOR_ASSIGN(maps_, OpenFile("/proc/self/maps", O_RDONLY));
  for (Tracked& tracked : tracked_) {
    UNMOOR_ASSIGN(tracked.prot, ProtectionOf(maps_.get(), tracked.range));
    locks.address_space.Acquire();
    const bool room = EnsureFaultHandler() > 0 &&
                      AddProtectedRange(tracked.range.begin.value, tracked.range.end.value,
                                        tracked.prot, tracked.bits.data());
    locks.address_space.Release();
    if (!room) return UserError("too many tracked ranges");
    const int denied = ProtectOwn(tracked.range, tracked.prot & ~PROT_WRITE);
    if (denied != 0) return SystemError(denied, "cannot protect tracked memory");
  }
  return {};
}

WriteTracker::~WriteTracker() {
  if (!IsOfThisProcess()) {
    (void)maps_.Release();
    return;
  }
  for (Tracked& tracked : tracked_) {
    if (by_protection()) {
      (void)ProtectOwn(tracked.range, tracked.prot);
      RemoveProtectedRange(tracked.range.begin.value);
      continue;
    }
    locks.address_space.Acquire();
    RemoveTracked(tracked.range.begin.value);
    locks.address_space.Release();
    watcher_->Unwatch(tracked.range);
  }
}

bool WriteTracker::IsOfThisProcess() const {
  return owner_ == OwnPid().value;
}

Result<std::vector<VaddrRange>> WriteTracker::Written(bool reset) {
  std::vector<VaddrRange> written;
  const std::lock_guard lock(mutex_);
  for (Tracked& tracked : tracked_) {
    if (!IsOfThisProcess()) {
      written.push_back(tracked.range);
      continue;
    }
    if (!by_protection()) {
      UNMOOR_TRY(
          ScanOwnPages(watcher_->fds().pagemap, tracked.range, true,
                       [](VaddrRange run, bool) { NoteWritten(run.begin.value, run.end.value); }));
    }
    if (!by_protection() && reset) WatchNewParts(tracked.range);
    std::vector<uint64_t> bits(tracked.bits.size());
    for (size_t i = 0; i < bits.size(); ++i) {
      bits[i] = reset ? __atomic_exchange_n(&tracked.bits[i], 0, __ATOMIC_SEQ_CST)
                      : __atomic_load_n(&tracked.bits[i], __ATOMIC_SEQ_CST);
    }
    if (by_protection() && reset) {
      // After the bits: a page that is still writable has its bit in what is returned.
      const int denied = ProtectOwn(tracked.range, tracked.prot & ~PROT_WRITE);
      if (denied != 0) return SystemError(denied, "cannot protect tracked memory");
    }
    AppendBits(bits, tracked.range, written);
  }
  return written;
}

}  // namespace unmoor::local
