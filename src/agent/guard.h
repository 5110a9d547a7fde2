// The `fault` guard from outside: what the worker does for it (the rest is in helper_protocol.h).
//
// Which windows of a remap are guarded is decided twice: here by what is known beforehand, in the
// helper by what it finds once every thread's system calls are held. A window that is not, is a
// freeze. Belongs to the worker's one thread; a failure only means that windows stay freezes.
#pragma once

#include <span>

#include "agent/helper_link.h"
#include "base/units.h"

namespace unmoor {

class Guard {
 public:
  // Puts the watch into the program, once; stops all its threads for that. False: not now (it is
  // tried again, a bounded number of times), or not in this program.
  [[nodiscard]] bool Ready(Pid pid, const HelperLink& link);

  uint64_t windows = 0;  // swapped with threads running on

 private:
  int attempts_ = 0;
  bool ready_ = false;
};

}  // namespace unmoor
