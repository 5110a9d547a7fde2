// See plan.h.
#include "restore/plan.h"

#include <sys/mman.h>

#include <algorithm>

#include "image/overlay.h"

namespace unmoor {
namespace {

// What this restore does not know how to bring back.
Result<> CheckRestorable(const Manifest& manifest, const std::string& directory) {
  if (manifest.kind == ImageKind::kMemory) {
    return UserError(
        "{} is an image of memory made by a program with libunmoor, not of a process; only a "
        "program that maps it can use it",
        directory);
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
  std::vector<const LayerInfo*> infos;
  for (const LayerInfo& layer : layers) infos.push_back(&layer);
  const Overlay overlay(infos, directory);
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
      UNMOOR_ASSIGN(const VmaPages pages, overlay.Resolve(task.vpid, vma));
      if (!overlay.GrowsIntoZeros(vma)) {
        return UserError(
            "{}: {} of task {} would grow into other pages of layer {}; the directory is damaged, "
            "restore it from a copy",
            directory, vma.range, task.vpid, layers[vma.layer].id);
      }
      mapping.mappings.push_back({vma.range, vma.layer, vma.offset});
      for (const OverlayRun& run : pages.deltas) {
        mapping.loads.push_back({run.range, run.layer, run.offset});
        plan.loaded += run.range.size();
      }
      plan.mapped += vma.range.size();
      plan.data += pages.data;
      ++plan.mappings;
    }
    if (!mapping.mappings.empty()) plan.tasks.push_back(std::move(mapping));
  }
  return plan;
}

Result<std::vector<LazyTask>> PlanLazyPages(const Manifest& manifest,
                                            std::span<const LayerInfo> layers,
                                            const std::string& directory) {
  std::vector<const LayerInfo*> infos;
  for (const LayerInfo& layer : layers) infos.push_back(&layer);
  const Overlay overlay(infos, directory);
  std::vector<LazyTask> tasks;
  for (const ManifestTask& task : manifest.tasks) {
    LazyTask lazy{task.vpid, {}};
    for (const ManifestVma& vma : task.vmas) {
      if (vma.kind != VmaKind::kMapped) continue;
      UNMOOR_ASSIGN(const VmaPages pages, overlay.Resolve(task.vpid, vma));
      lazy.pages.insert(lazy.pages.end(), pages.all.begin(), pages.all.end());
    }
    tasks.push_back(std::move(lazy));
  }
  return tasks;
}

void PlanFirstPages(const WorkingSet& set, std::span<const LayerInfo> layers,
                    std::vector<LazyTask>& tasks) {
  const auto place = [](const OverlayRun& run) { return std::pair(run.layer, run.offset.value); };
  std::vector<uint32_t> layer_of;  // by the set's numbers
  for (const std::string& id : set.layers) {
    const auto found = std::ranges::find(layers, id, &LayerInfo::id);
    layer_of.push_back(static_cast<uint32_t>(found - layers.begin()));
  }
  for (LazyTask& task : tasks) {
    std::vector<OverlayRun> runs = task.pages;
    std::ranges::sort(runs, {}, place);
    for (const WorkingSetRange& wanted : set.ranges) {
      const uint32_t layer = layer_of[wanted.layer];
      auto run =
          std::ranges::upper_bound(runs, std::pair(layer, wanted.range.begin.value), {}, place);
      if (run != runs.begin()) --run;  // it may reach into it
      for (; run != runs.end() && place(*run) < std::pair(layer, wanted.range.end.value); ++run) {
        if (run->layer != layer) continue;
        const FileRange all{run->offset, run->offset + run->range.size()};
        const FileRange part = all.Intersect(wanted.range);
        if (part.empty()) continue;
        const Vaddr begin = run->range.begin + (part.begin - all.begin);
        task.first.push_back({begin, begin + part.size()});
      }
    }
  }
}

Result<std::vector<FillTask>> PlanFill(const Manifest& manifest, std::span<const LayerInfo> layers,
                                       const std::string& directory) {
  std::vector<const LayerInfo*> infos;
  for (const LayerInfo& layer : layers) infos.push_back(&layer);
  const Overlay overlay(infos, directory);
  std::vector<FillTask> tasks;
  for (const ManifestTask& task : manifest.tasks) {
    FillTask fill{task.vpid, task.comm, {}, {}, {}};
    for (const ManifestVma& vma : task.vmas) {
      if (vma.kind != VmaKind::kMapped) continue;
      constexpr std::string_view kNamed = "[anon:";
      if (vma.name.starts_with(kNamed) && vma.name.ends_with(']')) {
        fill.names.push_back(
            {vma.range, vma.name.substr(kNamed.size(), vma.name.size() - kNamed.size() - 1)});
      }
      UNMOOR_ASSIGN(VmaPages pages, overlay.Resolve(task.vpid, vma));
      if (pages.all.empty()) continue;
      const bool wants_small = std::ranges::find(vma.flags, "nh") != vma.flags.end();
      fill.areas.push_back(
          {vma.range, (vma.prot & PROT_WRITE) != 0, !wants_small, std::move(pages.all)});
      fill.size += pages.data;
    }
    tasks.push_back(std::move(fill));
  }
  return tasks;
}

}  // namespace unmoor
