// Independent programs made direct-mapped again, so that a dump reads only what changed.
//
// The memory of a program that is READY is compared with what layers show while it runs, and where
// they show most of it the program maps them again, in windows as short as those of a remap. What
// it has beside that are copied-on-write pages, which CRIU finds without reading the rest. What
// cannot be put back, or not surely, stays as it is.
//
// An agent of its own does it and keeps the memory behaving as anonymous; afterwards it remaps the
// program again, unless it is held off (hold_off.h). See worker_put_back.cpp.
#pragma once

#include <string>
#include <vector>

#include "agent/agent.h"
#include "base/result.h"
#include "base/units.h"

namespace unmoor {

// Memory that a layer may show as well.
struct ShownByLayer {
  VaddrRange range;  // within one private anonymous VMA
  std::string file;
  FileOffset offset;  // of range.begin
};

struct PutBackTask {
  Pid pid;
  std::vector<ShownByLayer> ranges;
};

// Returns when that is done for all of them. An error: not for all, and some may be direct-mapped
// by now, in part; their agents are at work.
[[nodiscard]] Result<> PutBack(const std::vector<PutBackTask>& tasks, const AgentOptions& options);

}  // namespace unmoor
