// The `fault` guard from outside: what the worker does for it (the rest is in helper_protocol.h).
//
// Which windows of a remap are guarded is decided twice: here by what is known beforehand, in the
// helper by what it finds once every thread's system calls are held. A window that is not, is a
// freeze. Belongs to the worker's one thread; a failure only means that windows stay freezes.
#pragma once

#include <span>

#include "agent/inject.h"
#include "base/units.h"
#include "os/ptrace.h"

namespace unmoor {

class Guard {
 public:
  // Puts the watch beside a helper just injected; `stopped` are all threads of the program.
  void Begin(Pid pid, const HelperProcess& helper, std::span<StoppedThread> stopped);
  [[nodiscard]] bool ready() const { return ready_; }

  uint64_t windows = 0;  // swapped with threads running on

 private:
  bool ready_ = false;
};

}  // namespace unmoor
