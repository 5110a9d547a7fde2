// The recorder that `unmoor restore --record` leaves behind.
#pragma once

#include <string>
#include <vector>

#include "agent/agent.h"
#include "base/result.h"
#include "base/units.h"

namespace unmoor::cli {

struct RecordAfterRestore {
  std::vector<Pid> tasks;  // the root first
  std::string directory;
  Nanos until{-1};
  bool remap_afterwards = true;
  AgentOptions agent;
};

// Detached; once this returns `unmoor record --stop` finds it. With one thread only.
[[nodiscard]] Result<> StartRecorder(const RecordAfterRestore& wanted);

}  // namespace unmoor::cli
