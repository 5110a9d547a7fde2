// The process ids a restore needs.
#pragma once

#include <span>
#include <string>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

// criu makes every process with the id it had, and says "Can't fork: File exists" where one is
// taken; this says by whom. An id is taken by its process, and also as the process group or session
// of others when that has ended: of a zombie too, as our helper in a killed program may be for a
// moment. So what is ending is waited for, seconds if need be. Sessions without a process in the
// group of that id are not seen here, only by WhoTakesId().
[[nodiscard]] Result<> AwaitFreeIds(std::span<const Pid> ids);

// Who keeps one of `ids` from being free, looked for among all processes; empty: nobody.
[[nodiscard]] std::string WhoTakesId(std::span<const Pid> ids);

}  // namespace unmoor
