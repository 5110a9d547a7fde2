// The plan of a dump: for each VMA of a task, where its pages go.
//
// Pure: from what smaps tells about the (frozen) task to a value that can be printed and tested.
// A VMA goes to a layer when it is private anonymous memory that a private file mapping can stand
// in for, and holds enough pages to be worth a mapping; all else stays with CRIU. The rules are
// those of criu::WhyNotTakeable, told from smaps instead of mm images, and both are compared once
// CRIU has written its own (checkpoint.cpp).
//
// Memory that still maps a layer of the parent (parent.h) is anonymous in the program's eyes and so
// in the plan: what CRIU does not send of it is what the layer shows. Neighbours that were one VMA
// when the layer was made, some of them anonymous by now, are one again.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "base/units.h"
#include "image/delta_writer.h"
#include "os/procfs.h"

namespace unmoor {

struct CheckpointPlanOptions {
  // Less than this stays with CRIU: a mapping costs more than copying a few pages.
  Bytes least{uint64_t{64} << 10};
};

struct PlannedVma {
  VmaInfo vma;
  bool mapped = false;
  std::string_view why;            // not mapped: the reason, a phrase for "stays with CRIU: …"
  std::vector<LayerPiece> pieces;  // ascending, apart
};

// What a task still maps. By default: nothing.
struct MappedLayers {
  std::function<std::optional<uint32_t>(const VmaInfo&)> find;  // the layer a VMA maps
  std::vector<VaddrRange> whole;  // its VMAs when the layers were made, ascending
};

// Why the memory of `vma` can never be a mapping of a page image; empty when it can.
[[nodiscard]] std::string_view WhyNotTakeable(const VmaInfo& vma);

[[nodiscard]] std::vector<PlannedVma> PlanTask(std::span<const VmaInfo> vmas,
                                               const CheckpointPlanOptions& options,
                                               const MappedLayers& layers = {});

}  // namespace unmoor
