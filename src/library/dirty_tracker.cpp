// DirtyTracker: the public face of WriteTracker. See include/unmoor/dirty_tracker.h.
#include "unmoor/dirty_tracker.h"

#include <algorithm>

#include "library/status_from.h"
#include "library/tracked_ranges.h"
#include "remap/local/write_tracker.h"

namespace unmoor {
inline namespace v1 {
namespace {

VaddrRange RangeOf(MemoryRange memory) {
  const Vaddr begin(reinterpret_cast<uint64_t>(memory.begin));  // SAFETY: an address, not accessed
  return {begin, begin + Bytes(memory.size)};
}

StatusOr<std::vector<MemoryRange>> Report(Result<std::vector<VaddrRange>> written) {
  if (!written) return StatusFrom(written.error());
  std::vector<MemoryRange> ranges;
  for (const VaddrRange range : *written) {
    // SAFETY: back to the pointer the caller gave us a range of.
    ranges.push_back({reinterpret_cast<void*>(range.begin.value), range.size().value});
  }
  return ranges;
}

}  // namespace

class DirtyTracker::Impl {
 public:
  std::unique_ptr<local::WriteTracker> tracker;
  std::vector<VaddrRange> ranges;
};

DirtyTracker::DirtyTracker(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DirtyTracker::DirtyTracker(DirtyTracker&&) noexcept = default;
DirtyTracker& DirtyTracker::operator=(DirtyTracker&&) noexcept = default;
DirtyTracker::~DirtyTracker() = default;

StatusOr<DirtyTracker> DirtyTracker::Start(std::span<const MemoryRange> ranges) {
  std::vector<VaddrRange> wanted;
  for (const MemoryRange memory : ranges) {
    const VaddrRange range = RangeOf(memory);
    const bool aligned =
        range.begin.value % kPageSize == 0 && memory.size % kPageSize == 0 && memory.size > 0;
    if (!aligned) {
      return MakeStatus(StatusCode::kInvalidArgument, "memory {} is empty or not page-aligned",
                        range);
    }
    wanted.push_back(range);
  }
  std::ranges::sort(wanted);
  for (size_t i = 1; i < wanted.size(); ++i) {
    if (wanted[i - 1].Overlaps(wanted[i])) {
      return MakeStatus(StatusCode::kInvalidArgument, "memory {} and {} overlap", wanted[i - 1],
                        wanted[i]);
    }
  }
  auto tracker = local::WriteTracker::Start(wanted, false);
  if (!tracker) return StatusFrom(tracker.error());
  auto impl = std::make_unique<Impl>();
  impl->tracker = std::move(*tracker);
  impl->ranges = std::move(wanted);
  return DirtyTracker(std::move(impl));
}

StatusOr<std::vector<MemoryRange>> DirtyTracker::Changed() const {
  return Report(impl_->tracker->Written(false));
}

StatusOr<std::vector<MemoryRange>> DirtyTracker::Reset() {
  return Report(impl_->tracker->Written(true));
}

DirtyTracker::Mechanism DirtyTracker::mechanism() const {
  return impl_->tracker->by_protection() ? Mechanism::kMprotect : Mechanism::kWriteProtect;
}

// What was unmapped or moved counts as changed, so every page not reported is as it was. By
// mprotect only stores are seen: not what was given back, mapped anew or protected by the program
// itself.
std::vector<VaddrRange> TrackedRanges(const DirtyTracker& tracker) {
  const DirtyTracker::Impl& impl = tracker.impl();
  const bool sees_all = impl.tracker->IsOfThisProcess() && !impl.tracker->by_protection();
  return sees_all ? impl.ranges : std::vector<VaddrRange>();
}

}  // namespace v1
}  // namespace unmoor
