// Processes that are not our own children, or became so late: pidfds, signals, waiting, reaping.
//
// All waits take the process by a pidfd, so a reused pid never deceives them. Thread-safe, but only
// one thread should reap. Children we start ourselves: spawn.h.
#pragma once

#include <sys/types.h>

#include <optional>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

[[nodiscard]] Result<Fd> OpenPidFd(Pid pid);
[[nodiscard]] Result<> SendSignal(Pid pid, int signal);

// A copy of the descriptor `fd` of the process behind `pidfd` (pidfd_getfd; needs ptrace rights).
[[nodiscard]] Result<Fd> TakeFd(int pidfd, int fd);

enum class WaitOutcome { kExited, kTimeout, kInterrupted };
// Until the process behind `pidfd` has ended, `timeout` (negative: for ever) has passed or
// `interrupt` (-1: none) becomes readable.
[[nodiscard]] Result<WaitOutcome> WaitForExit(int pidfd, Nanos timeout, int interrupt);
// The same for any descriptor: true when readable, false after `timeout`.
[[nodiscard]] Result<bool> WaitReadable(int fd, Nanos timeout);

// Orphaned descendants become our children from now on (PR_SET_CHILD_SUBREAPER).
[[nodiscard]] Result<> BecomeSubreaper(bool on = true);
// The wait status of a child that has ended; nothing when `pid` is not our child or still runs.
[[nodiscard]] std::optional<int> ReapChild(Pid pid);
// SIGKILL to every descendant of the calling process. Reaps nothing.
void SignalDescendants(int signal);
// Kills every descendant of the calling process and reaps all of them; under BecomeSubreaper().
void KillDescendants();

// Whether any page of `range` of the process is a guard page (MADV_GUARD_INSTALL). False where the
// kernel has none or cannot tell.
[[nodiscard]] bool HasGuardPages(int pagemap_fd, VaddrRange range);

// The calling thread, and what it forks meanwhile, gets the CPU more often and for shorter (0.1
// ms), its share staying the same: so it goes before who has just woken it on that CPU
// (sched_setattr(2), SCHED_OTHER slices of Linux 6.12; without them it changes nothing). For
// answering, not for long work: that would go before the threads of a program in the same way.
void TakeShortTurns(bool on = true);

// As many as the limit may be raised to (RLIMIT_NOFILE), for us and those we start.
void AllowMoreDescriptors();
[[nodiscard]] Pid OwnPid();
[[nodiscard]] Pid ParentPid();
// While it lives the calling thread goes before all ordinary ones (SCHED_FIFO). Without the right
// (CAP_SYS_NICE) it changes nothing.
class Urgent {
 public:
  Urgent();
  Urgent(const Urgent&) = delete;
  Urgent& operator=(const Urgent&) = delete;
  ~Urgent();
};
[[nodiscard]] uint32_t OwnUid();  // effective
// Process group of `pid` (0: our own).
[[nodiscard]] int ProcessGroup(Pid pid);
[[nodiscard]] int Session(Pid pid);
// Whether any process, a zombie too, is in the process group of that id (above 1).
[[nodiscard]] bool IsProcessGroup(Pid id);
[[nodiscard]] Nanos MonotonicNow();
[[nodiscard]] Nanos WallClockNow();  // since 1970, UTC
void SleepFor(Nanos time);
[[nodiscard]] bool IsTerminal(int fd);
// Columns of the terminal behind `fd`, 80 when unknown.
[[nodiscard]] int TerminalWidth(int fd);

}  // namespace unmoor
