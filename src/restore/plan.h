// The plan of a restore: which ranges of which tasks map which layer, and from where.
//
// Pure: from the manifest and the layers' indexes. Each mapped VMA of the manifest must lie in the
// layers it names exactly where the manifest says; nothing is mapped that both do not agree on. A
// VMA is one mapping, of its own layer; pages of its deltas are CRIU's to load over it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "agent/name_memory.h"
#include "base/result.h"
#include "base/units.h"
#include "criu/rewrite.h"
#include "image/layer.h"
#include "image/manifest.h"
#include "image/working_set.h"
#include "lazy/state.h"

namespace unmoor {

struct RestorePlan {
  std::vector<criu::TaskMapping> tasks;  // those with something to map
  std::vector<uint32_t> stopped;         // virtual pids that were stopped when dumped
  uint64_t mappings = 0;
  Bytes mapped;  // address space
  Bytes data;    // of which the layers hold pages
  Bytes loaded;  // of these, copied at restore: the deltas
};

// `layers[i]` is the manifest's layer i. `directory` is for messages.
[[nodiscard]] Result<RestorePlan> PlanRestore(const Manifest& manifest,
                                              std::span<const LayerInfo> layers,
                                              const std::string& directory);

// For a lazy restore: where each page of the tasks comes from. The same layers.
[[nodiscard]] Result<std::vector<LazyTask>> PlanLazyPages(const Manifest& manifest,
                                                          std::span<const LayerInfo> layers,
                                                          const std::string& directory);

// Where in the tasks the pages of a working set are, for these to be brought first. Ranges of
// layers that are none of these mean nothing.
void PlanFirstPages(const WorkingSet& set, std::span<const LayerInfo> layers,
                    std::vector<LazyTask>& tasks);

// For an eager restore: what is to be in each task's memory before it runs. The same layers.
struct FillArea {
  VaddrRange vma;
  bool writable = false;
  bool may_be_huge = true;        // the program has not asked for small pages
  std::vector<OverlayRun> pages;  // ascending, disjoint
};
struct FillTask {
  uint32_t vpid = 0;
  std::string name;
  std::vector<FillArea> areas;  // those with pages; ascending
  Bytes size;                   // of all pages
  std::vector<NamedMemory> names;
};
[[nodiscard]] Result<std::vector<FillTask>> PlanFill(const Manifest& manifest,
                                                     std::span<const LayerInfo> layers,
                                                     const std::string& directory);

}  // namespace unmoor
