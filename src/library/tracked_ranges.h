// What a DirtyTracker can answer for, as Checkpoint needs to know it.
#pragma once

#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "unmoor/dirty_tracker.h"

namespace unmoor {
inline namespace v1 {

// The tracker's ranges without what was unmapped, moved away or mapped anew since the baseline (and
// nothing at all in a forked child, or where only stores are seen: Mechanism::kMprotect): there, a
// page that Changed() does not report is as it was at the baseline. Implemented in
// dirty_tracker.cpp.
[[nodiscard]] std::vector<VaddrRange> TrackedRanges(const DirtyTracker& tracker);

}  // namespace v1
}  // namespace unmoor
