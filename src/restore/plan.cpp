// See plan.h.
#include "restore/plan.h"

#include <algorithm>
#include <map>
#include <utility>

namespace unmoor {
namespace {

using ExtentKey = std::pair<uint32_t, Vaddr>;

std::vector<std::map<ExtentKey, const Extent*>> IndexExtents(std::span<const LayerInfo> layers) {
  std::vector<std::map<ExtentKey, const Extent*>> index(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    for (const Extent& extent : layers[i].extents) {
      index[i].emplace(ExtentKey{extent.task_vpid, extent.range.begin}, &extent);
    }
  }
  return index;
}

// What this restore does not know how to bring back.
Result<> CheckRestorable(const Manifest& manifest, const std::string& directory) {
  if (manifest.kind == ImageKind::kMemory) {
    return UserError(
        "{} is an image of memory made by a program with libunmoor, not of a process; only a "
        "program that maps it can use it",
        directory);
  }
  for (const ManifestTask& task : manifest.tasks) {
    for (const ManifestVma& vma : task.vmas) {
      if (vma.deltas.empty()) continue;
      return UserError("{}: {} of task {} is stored as deltas, which this unmoor cannot restore",
                       directory, vma.range, task.vpid);
    }
  }
  return {};
}

}  // namespace

Result<RestorePlan> PlanRestore(const Manifest& manifest, std::span<const LayerInfo> layers,
                                const std::string& directory) {
  UNMOOR_TRY(CheckRestorable(manifest, directory));
  if (layers.size() != manifest.layers.size()) {
    return UserError("{}: {} layers opened, the manifest names {}", directory, layers.size(),
                     manifest.layers.size());
  }
  const auto extents = IndexExtents(layers);
  RestorePlan plan;
  for (const ManifestTask& task : manifest.tasks) {
    criu::TaskMapping mapping;
    mapping.vpid = task.vpid;
    if (task.state == "stopped") plan.stopped.push_back(task.vpid);
    for (const ManifestVma& vma : task.vmas) {
      if (vma.kind != VmaKind::kMapped) continue;
      if (vma.layer >= layers.size()) {
        return UserError("{}: task {} names layer {}, there are {}", directory, task.vpid,
                         vma.layer, layers.size());
      }
      const auto found = extents[vma.layer].find({task.vpid, vma.range.begin});
      if (found == extents[vma.layer].end() || found->second->range != vma.range ||
          found->second->offset != vma.offset) {
        return UserError(
            "{}: manifest and index of layer {} differ about {} of task {}; the "
            "directory is damaged, restore it from a copy",
            directory, layers[vma.layer].id, vma.range, task.vpid);
      }
      mapping.mappings.push_back({vma.range, vma.layer, vma.offset});
      plan.mapped += vma.range.size();
      plan.data += found->second->data;
      ++plan.mappings;
    }
    if (!mapping.mappings.empty()) plan.tasks.push_back(std::move(mapping));
  }
  return plan;
}

}  // namespace unmoor
