// MapPlan: what has to be mapped, and what copied, to have an image's memory. Pure.
//
// Each VMA of the image is mapped from its own layer; over it come its deltas: long runs mapped,
// short ones copied in, and the more are copied the fewer mappings the process may have
// (vm.max_map_count). A run mapped inside another mapping costs up to two more of them.
#pragma once

#include <cstdint>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/overlay.h"
#include "library/page_image_impl.h"

namespace unmoor {
inline namespace v1 {

struct PlannedVma {
  OverlayRun base;
  int prot = 0;
  std::vector<OverlayRun> mapped;  // over the base
  std::vector<OverlayRun> copied;  // into it
};

inline constexpr Bytes kMinMappedRun(64 << 10);

// `mappings_left`: how many more the process may have. An error (ENOMEM) when that is too few for
// the bases alone.
[[nodiscard]] Result<std::vector<PlannedVma>> PlanMap(const PageImage::Impl& image,
                                                      size_t mappings_left);

}  // namespace v1
}  // namespace unmoor
