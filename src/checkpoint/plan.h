// The plan of a dump: for each VMA of a task, where its pages go.
//
// Pure: from what smaps tells about the (frozen) task to a value that can be printed and tested.
// A VMA goes to a layer when it is private anonymous memory that a private file mapping can stand
// in for, and holds enough pages to be worth a mapping; all else stays with CRIU. The rules are
// those of criu::WhyNotTakeable, told from smaps instead of mm images, and both are compared once
// CRIU has written its own (checkpoint.cpp).
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "base/units.h"
#include "os/procfs.h"

namespace unmoor {

struct CheckpointPlanOptions {
  // Less than this stays with CRIU: a mapping costs more than copying a few pages.
  Bytes least{uint64_t{64} << 10};
};

struct PlannedVma {
  VmaInfo vma;
  bool mapped = false;
  std::string_view why;  // not mapped: the reason, a phrase for "stays with CRIU: …"
};

// Why the memory of `vma` can never be a mapping of a page image; empty when it can.
[[nodiscard]] std::string_view WhyNotTakeable(const VmaInfo& vma);

[[nodiscard]] std::vector<PlannedVma> PlanTask(std::span<const VmaInfo> vmas,
                                               const CheckpointPlanOptions& options);

}  // namespace unmoor
