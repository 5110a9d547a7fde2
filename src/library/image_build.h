// BuildImage: a plan of ranges made into a published image directory.
//
// One new layer takes what has to be written; layers of the base that are still needed are linked
// into the new directory (copied where they cannot be). The directory appears complete or not at
// all (Publisher).
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "image/publisher.h"
#include "library/memory_plan.h"
#include "library/page_image_impl.h"
#include "unmoor/page_image.h"

namespace unmoor {
inline namespace v1 {

struct BuildRequest {
  std::vector<PlannedRange> ranges;       // ascending, apart
  const PageImage::Impl* base = nullptr;  // REQUIRED where a range has a base_vma
  std::string_view user_data;
  bool sync = true;
};

// The checks of WriterOptions::replace, and Publisher::Begin.
StatusOr<Publisher> BeginImage(const std::string& dir, bool replace);
StatusOr<ImageReport> BuildImage(Publisher& publisher, const BuildRequest& request);

}  // namespace v1
}  // namespace unmoor
