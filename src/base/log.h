// Diagnostics on stderr, through spdlog. One logger per process; levels follow -v / -q.
//
// Results go to stdout, everything else here. A log line never carries what belongs in a Result.
#pragma once

#include <spdlog/spdlog.h>

namespace unmoor {

// Call once at start of main, before threads. 0 = warnings, 1 = info, 2 = debug; -1 = errors only.
// Lines look like "unmoor: message".
void InitLogging(int verbosity);

}  // namespace unmoor
