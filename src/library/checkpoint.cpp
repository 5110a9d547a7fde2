// Checkpoint: the plan of the memory, held against the base, built. See unmoor/checkpoint.h.
#include "unmoor/checkpoint.h"

#include <algorithm>

#include "library/image_build.h"
#include "library/memory_plan.h"
#include "library/page_image_impl.h"
#include "library/status_from.h"
#include "library/tracked_ranges.h"

namespace unmoor {
inline namespace v1 {
namespace {

// What the tracker answers for, and what it calls changed.
struct Tracked {
  std::vector<VaddrRange> ranges;
  std::vector<VaddrRange> changed;
};

StatusOr<Tracked> Ask(const DirtyTracker* tracker) {
  Tracked tracked;
  if (tracker == nullptr) return tracked;
  auto changed = tracker->Changed();
  if (!changed.ok()) return changed.status();
  for (const MemoryRange& range : *changed) {
    const Vaddr begin(reinterpret_cast<uint64_t>(range.begin));  // SAFETY: arithmetic only
    tracked.changed.push_back({begin, begin + Bytes(range.size)});
  }
  tracked.ranges = TrackedRanges(*tracker);
  std::ranges::sort(tracked.ranges);
  std::ranges::sort(tracked.changed);
  return tracked;
}

}  // namespace

StatusOr<ImageReport> Checkpoint(std::span<const MemoryRange> ranges, const std::string& dir,
                                 const CheckpointOptions& options) {
  if (options.tracker != nullptr && options.base == nullptr) {
    return MakeStatus(StatusCode::kInvalidArgument, "a tracker without a base image");
  }
  auto publisher = BeginImage(dir, options.replace);
  if (!publisher.ok()) return publisher.status();
  const auto tracked = Ask(options.tracker);
  if (!tracked.ok()) return tracked.status();
  BuildRequest request;
  UNMOOR_STATUS_ASSIGN(request.ranges, PlanMemory(ranges));
  if (options.base != nullptr) {
    request.base = options.base->impl().get();
    UNMOOR_STATUS_ASSIGN(request.ranges, RelateToBase(std::move(request.ranges), *request.base,
                                                      tracked->ranges, tracked->changed));
  }
  request.user_data = options.user_data;
  request.sync = options.sync;
  return BuildImage(*publisher, request);
}

}  // namespace v1
}  // namespace unmoor
