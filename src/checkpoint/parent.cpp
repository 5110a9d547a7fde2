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

bool IsMostlyChanged(const DeltaWriter& writer, const LayerBase& base, const PageSource& now) {
  constexpr uint64_t kEnough = uint64_t{64} << 20;  // less is copied in no time
  return base.pages.data.value >= kEnough && writer.SampleChanged(base, now) > 0.25;
}

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
    UNMOOR_TRY(parent.Add(std::move(reader)));
  }
  parent.Resolve();
  return parent;
}

Result<> Parent::Add(LayerReader layer) {
  UNMOOR_ASSIGN(const struct stat file, StatFd(layer.pages_fd().get(), layer.pages_path()));
  files_.push_back({major(file.st_dev), minor(file.st_dev), file.st_ino});
  layers_.push_back(std::move(layer));
  return {};
}

void Parent::Resolve() {
  std::vector<const LayerInfo*> infos;
  for (const LayerReader& layer : layers_) infos.push_back(&layer.info());
  overlay_.emplace(infos, directory_);
}

Result<Parent> Parent::Over(std::optional<Parent> below, const std::string& directory,
                            LayerReader layer, const std::vector<ManifestTask>& tasks) {
  Parent parent;
  if (below) {
    parent = *std::move(below);
  } else {
    parent.directory_ = directory;
  }
  const auto number = static_cast<uint32_t>(parent.layers_.size());
  UNMOOR_TRY(parent.Add(std::move(layer)));
  parent.Resolve();
  for (const ManifestTask& ahead : tasks) {
    auto task = std::ranges::find(parent.manifest_.tasks, ahead.vpid, &ManifestTask::vpid);
    if (task == parent.manifest_.tasks.end()) {
      parent.manifest_.tasks.emplace_back().vpid = ahead.vpid;
      task = std::prev(parent.manifest_.tasks.end());
    }
    for (ManifestVma vma : ahead.vmas) {
      std::erase_if(task->vmas,
                    [&](const ManifestVma& old) { return old.range.Overlaps(vma.range); });
      vma.layer = number;
      task->vmas.push_back(std::move(vma));
    }
    std::ranges::sort(task->vmas, {}, [](const ManifestVma& vma) { return vma.range.begin; });
  }
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
