// A program about to be dumped: no agent inside, and what it still maps of the parent's layers.
//
// CRIU can dump a program that is direct-mapped: to it the memory is a private mapping of a file,
// of which it sends what was copied on write. So frozen time follows what changed since the
// restore. For that every mapping has to be of a layer of the parent, told by device and inode.
// CRIU is told the files by mount and inode (--external), so that it does not look for their names:
// the image may have been moved or deleted.
//
// Whatever does not fit is no error: the remap is finished first, as without all this. Nothing of
// the program is changed.
#pragma once

#include <string>
#include <vector>

#include "agent/hold_off.h"
#include "agent/put_back.h"
#include "base/result.h"
#include "base/units.h"
#include "checkpoint/parent.h"
#include "checkpoint/plan.h"

namespace unmoor {

// Asks for the programs of the tree below `root`, those in it now.
[[nodiscard]] Result<std::vector<HoldOff>> AskForTree(Pid root);
// Every program of the tree below `root`, with no agent inside for as long as the result lives.
// errnum EAGAIN: one is inside that cannot leave just now. `asked`: of programs asked for already.
[[nodiscard]] Result<std::vector<HoldOff>> HoldTree(Pid root, std::vector<HoldOff> asked = {});

// What of the programs the parent's layers may show: all their memory that stands on some.
// Nothing when one of them is not independent of its image.
[[nodiscard]] Result<std::vector<PutBackTask>> FindShownByParent(
    const std::vector<HoldOff>& programs, const Parent& parent,
    const CheckpointPlanOptions& options);

struct StillMapped {
  std::vector<std::string> files;  // CRIU's --external keys; none: nothing is mapped
  std::string why_not;             // it cannot be dumped as it is
};
// Of programs held.
[[nodiscard]] Result<StillMapped> FindStillMapped(const std::vector<HoldOff>& programs,
                                                  const Parent& parent);

// A thread waits for the agent that is out: it can be neither frozen nor let go.
[[nodiscard]] bool WaitsForAgent(const std::vector<HoldOff>& programs);

}  // namespace unmoor
