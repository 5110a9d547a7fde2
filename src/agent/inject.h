// Getting the helper into a program, and out of it.
//
// A thread of the program is stopped and made to run four system calls: mmap of the helper's
// region, clone(CLONE_VM) of the helper, and at the end wait4 and munmap. The helper is a child of
// the program without exit signal: wait() calls of the program do not see it.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "os/procfs.h"
#include "os/ptrace.h"

namespace unmoor {

struct HelperProcess {
  Pid pid;
  Vaddr region;  // where its code begins in the program
};

// Adds the watch (helper_protocol.h) to a helper just injected: a thread of the program that runs
// our code. The helper never stops it; it ends itself with the helper.
[[nodiscard]] Result<> InjectWatch(Pid pid, const HelperProcess& helper,
                                   std::span<StoppedThread> stopped);

// A helper's region left in the program by an agent that was killed, with what that helper owned.
struct Leftover {
  Vaddr region;
  std::vector<VaddrRange> owned;
};

// One of `stopped`, all threads of `pid`, runs the calls. `vmas`: of `pid`, as they are now;
// `nested`: it lives in a PID namespace below ours. Returns with the helper running; the threads
// are still stopped.
[[nodiscard]] Result<HelperProcess> InjectHelper(Pid pid, std::span<StoppedThread> stopped,
                                                 std::span<const VmaInfo> vmas, bool nested);

// Reaps every helper that has ended, ends a watch that is still there, and unmaps the regions and
// what is owned. errnum EAGAIN: a thread executes our code still; let it run and try again.
[[nodiscard]] Result<> RemoveHelperTraces(Pid pid, std::span<StoppedThread> stopped,
                                          std::span<const Leftover> leftovers);

// What earlier helpers left in the program, by its mappings.
[[nodiscard]] std::vector<Leftover> FindLeftovers(Pid pid, std::span<const VmaInfo> vmas);
[[nodiscard]] Result<std::vector<Leftover>> FindLeftovers(Pid pid);
// Helpers among the children of `pid`; `ended` tells zombies from living ones.
struct HelperChild {
  Pid pid;
  int pid_in_program = 0;  // as the program would name it
  bool ended = false;
};
[[nodiscard]] Result<std::vector<HelperChild>> FindHelpers(Pid pid);

}  // namespace unmoor
