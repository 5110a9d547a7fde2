// Stands in for dirty_tracker.cpp until the library has it; weak, so that it then wins.
#include "library/tracked_ranges.h"

namespace unmoor {
inline namespace v1 {

__attribute__((weak)) StatusOr<std::vector<MemoryRange>> DirtyTracker::Changed() const {
  return Status(StatusCode::kUnsupported, "no tracker");
}
__attribute__((weak)) std::vector<VaddrRange> TrackedRanges(const DirtyTracker& /*tracker*/) {
  return {};
}

}  // namespace v1
}  // namespace unmoor
