// Writing memory before the freeze: the pages of running programs become a layer of their own, and
// what they write meanwhile is written once more, round by round.
//
// Nothing is inside the programs for it and nothing is tracked: each round reads the memory and
// compares it with what the layer shows by then. So what the layer ends up with may be old, or of
// several moments; the dump, which compares again while the programs stand still, takes it for a
// parent like any other (parent.h) and writes what differs. A round that finds little, or not much
// less than the one before, is the last: the program writes as fast as we do.
//
// Memory that stands on a checkpoint's layers with few changes is left to those; a forked child's
// that is mostly its parent's is written once. What cannot be read (unmapped meanwhile) is left
// out. One thread. Document: docs/architecture.md, "Dump".
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "checkpoint/parent.h"
#include "checkpoint/plan.h"
#include "image/layer_reader.h"
#include "image/manifest.h"

namespace unmoor {

struct WriteAheadOptions {
  std::string directory;  // an image directory in the making
  std::string layer_id;
  int most_rounds = 4;
  const Parent* parent = nullptr;
  CheckpointPlanOptions plan;
  std::function<Result<>()> go_on;  // an error ends it with that error; asked now and then
  std::function<void(Bytes done, Bytes expected)> progress;  // may be empty
};

struct WrittenAhead {
  LayerReader layer;
  std::vector<ManifestTask> tasks;  // the VMAs whose pages the layer shows, as its only layer
  int rounds = 0;
  Bytes last_round;  // bytes that differed in it
};

// Nothing: there is no memory worth it. The layer is durable.
[[nodiscard]] Result<std::optional<WrittenAhead>> WriteAhead(const std::vector<Pid>& programs,
                                                             const WriteAheadOptions& options);

}  // namespace unmoor
