// Resource limits of other processes.
#pragma once

#include "base/units.h"

namespace unmoor {

// `to` gets the limits of address space and data that `from` has now. Where that is not allowed, or
// one of them has ended, it changes nothing.
void CopyMemoryLimits(Pid from, Pid to);

}  // namespace unmoor
