// See parent.h.
#include "checkpoint/parent.h"

#include <sys/sysmacros.h>

#include <algorithm>

#include "os/file.h"

namespace unmoor {
namespace {

// Two descriptors each; and a restore opens as many.
constexpr size_t kMostLayers = 128;
}  // namespace

Result<Parent> Parent::Open(const std::string& directory) {
  Parent parent;
  UNMOOR_ASSIGN(parent.manifest_, ReadManifest(directory));
  UNMOOR_ASSIGN(parent.directory_, RealPath(directory));
  if (parent.manifest_.kind != ImageKind::kProcess) {
    return UserError("{} is an image of memory, not of a process", directory);
  }
  if (parent.manifest_.layers.size() > kMostLayers) {
    return UserError("{} is a chain of {} layers; {} are the most to add one to", directory,
                     parent.manifest_.layers.size(), kMostLayers);
  }
  for (const ManifestLayer& entry : parent.manifest_.layers) {
    UNMOOR_ASSIGN(LayerReader reader, LayerReader::Open(parent.directory_, entry));
    UNMOOR_ASSIGN(const struct stat file, StatFd(reader.pages_fd().get(), reader.pages_path()));
    parent.files_.push_back({major(file.st_dev), minor(file.st_dev), file.st_ino});
    parent.layers_.push_back(std::move(reader));
  }
  std::vector<const LayerInfo*> infos;
  for (const LayerReader& layer : parent.layers_) infos.push_back(&layer.info());
  parent.overlay_.emplace(infos, parent.directory_);
  return parent;
}

std::optional<uint32_t> Parent::LayerOf(const VmaInfo& vma) const {
  if (vma.inode == 0 || vma.shared) return std::nullopt;
  const auto found = std::ranges::find(files_, FileId{vma.dev_major, vma.dev_minor, vma.inode});
  if (found == files_.end()) return std::nullopt;
  return static_cast<uint32_t>(found - files_.begin());
}

std::vector<VaddrRange> Parent::MappedRanges(uint32_t vpid) const {
  std::vector<VaddrRange> ranges;
  const auto task = std::ranges::find(manifest_.tasks, vpid, &ManifestTask::vpid);
  if (task == manifest_.tasks.end()) return ranges;
  for (const ManifestVma& vma : task->vmas) {
    if (vma.kind == VmaKind::kMapped) ranges.push_back(vma.range);
  }
  return ranges;
}

std::optional<LayerBase> Parent::Find(uint32_t vpid, const VmaInfo& vma, bool still_mapped) const {
  const auto task = std::ranges::find(manifest_.tasks, vpid, &ManifestTask::vpid);
  if (task == manifest_.tasks.end()) return std::nullopt;
  const ManifestVma* best = nullptr;
  for (const ManifestVma& old : task->vmas) {
    if (old.kind != VmaKind::kMapped || !old.range.Overlaps(vma.range)) continue;
    const Bytes shared = old.range.Intersect(vma.range).size();
    if (best == nullptr || shared > best->range.Intersect(vma.range).size()) best = &old;
  }
  if (best == nullptr) return std::nullopt;
  const auto reached = overlay_->Reach(*best, vma.range);
  if (!reached) return std::nullopt;
  auto pages = overlay_->Resolve(vpid, *reached);
  if (!pages) return std::nullopt;
  LayerBase base{*reached, *std::move(pages)};
  if (!IsWorthwhile(base, still_mapped ? base.pages.data : vma.anonymous)) return std::nullopt;
  return base;
}

}  // namespace unmoor
