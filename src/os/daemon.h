// Becoming a background process, and forking without exec. For programs with one thread only.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

// fork(2): pid 0 in the child.
[[nodiscard]] Result<Pid> ForkProcess();
// A process of its own session, not our child, with standard streams on /dev/null (stderr on a log
// file if asked for) and no descriptors but those to keep. Becoming that takes two forks; meanwhile
// the caller has this.
class StartingDaemon {
 public:
  StartingDaemon(Pid middle, Fd pipe) : middle_(middle), pipe_(std::move(pipe)) {}
  StartingDaemon(StartingDaemon&& other) noexcept
      : middle_(std::exchange(other.middle_, Pid{})), pipe_(std::move(other.pipe_)) {}
  StartingDaemon& operator=(StartingDaemon&&) = delete;
  ~StartingDaemon() { (void)Wait(); }
  // Its pid, once it is not below us any more. Call once.
  [[nodiscard]] Result<Pid> Wait();

 private:
  Pid middle_;
  Fd pipe_;
};
// Keeps `keep`, ascending. Nothing in the new process, whose comm is `name`.
[[nodiscard]] Result<std::optional<StartingDaemon>> ForkDaemon(std::span<const int> keep,
                                                               const std::string& log_file,
                                                               const std::string& name);
// fork(2) with one table of descriptors for both: what one of them opens, receives or closes, both
// have or have not; it stays open until the last one has ended.
[[nodiscard]] Result<Pid> ForkSharingDescriptors();
[[nodiscard]] Result<Fd> Duplicate(int fd);  // close-on-exec
// Without running destructors or atexit handlers.
[[noreturn]] void ExitProcess(int code);

// SIGUSR1 no longer ends the process; SignalSeen tells whether it came since
// (or since ForgetSignal).
void NoticeSignal();
// SIGUSR1 does nothing, here and in children.
void IgnoreSignal();
[[nodiscard]] bool SignalSeen();
void ForgetSignal();

// Those of `fds` (negative ones are skipped) that are readable or closed at the other end; waits
// for at least one, at most `timeout` (negative: for ever).
[[nodiscard]] Result<std::vector<int>> WaitAnyReadable(const std::vector<int>& fds, Nanos timeout);

}  // namespace unmoor
