// See parent.h.
#include "checkpoint/parent.h"

#include <algorithm>
#include <cstring>

#include "image/layout.h"
#include "os/file.h"

namespace unmoor {
namespace {

// Two descriptors each; and a restore opens as many.
constexpr size_t kMostLayers = 128;
// CRIU copies a delta's pages at restore, so a VMA that has more of them than this share, and more
// than `kCheap`, is written in full again.
constexpr uint64_t kDeltaShare = 4;
constexpr Bytes kCheap(uint64_t{16} << 20);

Bytes Sum(const std::vector<OverlayRun>& runs) {
  Bytes sum;
  for (const OverlayRun& run : runs) sum += run.range.size();
  return sum;
}

bool IsWorthwhile(const ParentBase& base, const VmaInfo& vma) {
  if (base.vma.deltas.size() >= kMaxDeltas) return false;
  const Bytes allowed = std::max(kCheap, Bytes(vma.anonymous.value / kDeltaShare));
  if (Sum(base.pages.deltas) > allowed) return false;
  // At least so many pages are new, or have vanished and would come back as pages of zeros.
  const Bytes data = base.pages.data;
  const Bytes differ = data > vma.anonymous ? data - vma.anonymous : vma.anonymous - data;
  return differ <= allowed;
}

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
    parent.layers_.push_back(std::move(reader));
  }
  std::vector<const LayerInfo*> infos;
  for (const LayerReader& layer : parent.layers_) infos.push_back(&layer.info());
  parent.overlay_.emplace(infos, parent.directory_);
  return parent;
}

std::optional<ParentBase> Parent::Find(uint32_t vpid, const VmaInfo& vma) const {
  const auto task = std::ranges::find(manifest_.tasks, vpid, &ManifestTask::vpid);
  if (task == manifest_.tasks.end()) return std::nullopt;
  const ManifestVma* best = nullptr;
  for (const ManifestVma& old : task->vmas) {
    if (old.kind != VmaKind::kMapped || !old.range.Overlaps(vma.range)) continue;
    const Bytes shared = old.range.Intersect(vma.range).size();
    if (best == nullptr || shared > best->range.Intersect(vma.range).size()) best = &old;
  }
  if (best == nullptr) return std::nullopt;
  const auto reached = overlay_->Reach(vpid, *best, vma.range);
  if (!reached) return std::nullopt;
  auto pages = overlay_->Resolve(vpid, *reached);
  if (!pages) return std::nullopt;
  ParentBase base{*reached, *std::move(pages)};
  if (!IsWorthwhile(base, vma)) return std::nullopt;
  return base;
}

Result<> Parent::Read(const ParentBase& base, VaddrRange range, std::span<std::byte> to) const {
  std::memset(to.data(), 0, to.size());
  const auto& runs = base.pages.all;
  auto run = std::ranges::partition_point(
      runs, [&](const OverlayRun& r) { return r.range.end <= range.begin; });
  for (; run != runs.end() && run->range.begin < range.end; ++run) {
    const VaddrRange part = run->range.Intersect(range);
    const LayerReader& layer = layers_[run->layer];
    UNMOOR_TRY(ReadExactlyAt(layer.pages_fd().get(),
                             to.subspan((part.begin - range.begin).value, part.size().value),
                             run->offset + (part.begin - run->range.begin), layer.pages_path()));
  }
  return {};
}

}  // namespace unmoor
