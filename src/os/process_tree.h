// Ending processes that are not our own children.
#pragma once

#include "base/units.h"

namespace unmoor {

// Kills `root`, not necessarily below us, and every process below it, also those just being forked:
// all are stopped first. Reaps nothing.
void KillTree(Pid root);

}  // namespace unmoor
