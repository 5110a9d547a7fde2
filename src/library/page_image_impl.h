// An opened image as the library's parts see it: the manifest, its layers, and for each VMA of the
// manifest where its pages are. Immutable; shared by PageImage, DirectMap and Checkpoint.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "image/manifest.h"
#include "image/overlay.h"
#include "library/mapped_pieces.h"
#include "unmoor/page_image.h"

namespace unmoor {
inline namespace v1 {

class PageImage::Impl {
 public:
  std::string directory;
  Manifest manifest;
  std::string parent_id;
  std::string user_data;
  std::vector<std::shared_ptr<const SharedLayer>> layers;  // as in the manifest
  std::vector<VmaPages> pages;                             // of vmas()[i]
  std::vector<ImageRange> ranges;  // VMAs that touch and have one protection, joined

  [[nodiscard]] const std::vector<ManifestVma>& vmas() const { return manifest.tasks[0].vmas; }
};

}  // namespace v1
}  // namespace unmoor
