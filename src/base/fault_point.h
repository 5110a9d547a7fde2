// Named fault points: places where a test can make the process die or an operation fail.
//
//   UNMOOR_TRY(FaultPoint("publish.before_rename"));
//
// UNMOOR_FAULT=name:kill ends the process there as kill -9 would; name:stop stops it until it is
// continued; name:error makes the point return an error; name:error@3 acts on the third passage.
// Compiled out (always success) unless the build sets UNMOOR_FAULT_POINTS, which every preset but
// release does. Thread-safe.
#pragma once

#include "base/result.h"

namespace unmoor {

#ifdef UNMOOR_FAULT_POINTS
[[nodiscard]] Result<> FaultPoint(const char* name);
#else
[[nodiscard]] inline Result<> FaultPoint(const char* /*name*/) {
  return {};
}
#endif

}  // namespace unmoor
