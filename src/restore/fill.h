// Fill: all pages of an image go into the memory of tasks that do not run yet (restore --mode
// eager).
//
// CRIU has made that memory, anonymous and empty, and stopped the tasks. Nobody runs in it, so
// nothing has to be guarded, swapped or put inside: threads of this process read blocks of the
// layers, hold each against its hash and write its pages in place from outside. 2 MiB blocks all of
// whose pages are in the image become huge pages first, so that they are written once.
//
// Memory is looked for before it is taken (os/memory_room.h). After a failure part of the memory is
// filled: the tasks must not run. Its message names the file and offset of a damaged block, and the
// task and address it was for. Document: docs/architecture.md, "Restore".
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "base/crew.h"
#include "base/result.h"
#include "base/units.h"
#include "image/layer_source.h"
#include "restore/plan.h"

namespace unmoor {

struct FillTarget {
  Pid pid;  // stopped
  const FillTask* task = nullptr;
};

struct FillOptions {
  bool huge = true;
  unsigned threads = 0;  // 0: as many as there are processors
  Crew::Look look;       // called meanwhile; an error ends the work
};

// `layers[i]` is the plan's layer i, with its hashes.
[[nodiscard]] Result<> Fill(std::span<const FillTarget> targets, const LayerSources& layers,
                            const FillOptions& options);

}  // namespace unmoor
