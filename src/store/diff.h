// Diff: what memory differs between two checkpoints, by task and VMA.
//
// Tasks are told apart by their virtual ids, VMAs by their addresses: one that moved its bounds is
// the same VMA as long as they overlap. A page that is nowhere reads zero. What both have on one
// page of one layer is equal without being read, so two generations of a chain are compared in the
// time of what changed. Hashes are not looked at: that is verify's.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/manifest.h"

namespace unmoor {

struct VmaDifference {
  // At least one of them is there; both: the VMA of either side.
  std::optional<VaddrRange> before;
  std::optional<VaddrRange> after;
  std::string name;
  PageCount
      changed;  // other contents in the addresses both have, or not zero where only one has them
  [[nodiscard]] bool differs() const { return changed.value > 0 || before != after; }
};

struct TaskDifference {
  uint32_t vpid = 0;
  std::string comm;
  bool before = false;  // which side has it
  bool after = false;
  std::vector<VmaDifference> vmas;  // those that differ, ascending
};

struct DiffReport {
  std::vector<TaskDifference> tasks;  // those with a difference
  Bytes pages_before;                 // of all memory
  Bytes pages_after;
  Bytes changed;
  Bytes compared;  // had to be read on both sides
};

[[nodiscard]] Result<DiffReport> Diff(const std::string& before, const std::string& after);

}  // namespace unmoor
