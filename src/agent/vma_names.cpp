// See vma_names.h.
#include "agent/vma_names.h"

#include <algorithm>

#include "image/layout.h"

namespace unmoor {
namespace {

constexpr std::string_view kOpening = "[anon:";
constexpr std::string_view kLayers = "/layers/";

// DIR/layers/<id>.pages, perhaps with " (deleted)" behind it.
std::vector<VmaNames::Named> ReadBeside(const std::string& image) {
  const size_t at = image.rfind(kLayers);
  if (at == std::string::npos) return {};
  const std::string id = image.substr(at + kLayers.size(), kLayerIdLength);
  if (!IsValidId(id)) return {};
  const auto manifest = ReadManifest(image.substr(0, at));
  return manifest ? VmaNames::In(*manifest, id) : std::vector<VmaNames::Named>();
}

}  // namespace

std::vector<VmaNames::Named> VmaNames::In(const Manifest& manifest, std::string_view layer_id) {
  std::vector<Named> named;
  for (const ManifestTask& task : manifest.tasks) {
    for (const ManifestVma& vma : task.vmas) {
      if (vma.kind != VmaKind::kMapped || manifest.layers[vma.layer].id != layer_id) continue;
      if (!vma.name.starts_with(kOpening) || !vma.name.ends_with(']')) continue;
      named.push_back({{vma.offset, vma.offset + vma.range.size()},
                       vma.name.substr(kOpening.size(), vma.name.size() - kOpening.size() - 1)});
    }
  }
  return named;
}

void VmaNames::Learn(std::span<const VmaInfo> images) {
  for (const VmaInfo& image : images) {
    if (!images_.contains(image.name)) images_.emplace(image.name, ReadBeside(image.name));
  }
}

std::string VmaNames::At(const std::string& image, FileOffset offset) const {
  const auto known = images_.find(image);
  if (known == images_.end()) return {};
  const auto named = std::ranges::find_if(known->second, [&](const Named& item) {
    return item.range.begin <= offset && offset < item.range.end;
  });
  return named == known->second.end() ? std::string() : named->name;
}

}  // namespace unmoor
