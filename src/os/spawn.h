// Child processes: started with an exact set of descriptors, waited for by pidfd.
//
// A child inherits stdin, stdout and stderr (or what `SpawnOptions` puts there) and the listed
// descriptors, nothing else of ours: everything else is close-on-exec. Signal masks and
// dispositions of the child are the defaults, whatever the caller blocked. A ChildProcess that goes
// out of scope while its child runs leaves the child alone and unreaped; call Wait. Not thread-safe
// per object.
#pragma once

#include <csignal>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

// Descriptor `fd` of ours becomes descriptor `as` in the child.
struct InheritedFd {
  int fd = -1;
  int as = -1;
};

struct SpawnOptions {
  std::vector<std::string> argv;  // argv[0] is the path, looked up in PATH if it has no slash
  std::vector<InheritedFd> fds;   // `as` from 3 on; all different
  std::vector<std::string> environment;  // NAME=VALUE, beside what we have; no NAME twice
  std::optional<int> stdin_fd;           // unset: ours
  std::optional<int> stdout_fd;
  std::optional<int> stderr_fd;
  bool own_process_group = false;  // a Ctrl-C at the terminal then reaches only us
  bool new_session = false;        // setsid
  // Return before the program is executed: a caller that waits for that sleeps, and may be woken on
  // the CPU where the child has begun to work. A program that cannot be executed ends with 127 and
  // a line on stderr.
  bool at_once = false;
};

struct ExitStatus {
  int code = 0;    // exit code when signal == 0
  int signal = 0;  // the signal that ended it
  [[nodiscard]] bool ok() const { return code == 0 && signal == 0; }
};

class ChildProcess {
 public:
  ChildProcess(Pid pid, Fd pidfd) : pid_(pid), pidfd_(std::move(pidfd)) {}

  [[nodiscard]] Pid pid() const { return pid_; }
  // Readable once the child has ended; for poll.
  [[nodiscard]] int pidfd() const { return pidfd_.get(); }

  // Blocks until the child ends, and reaps it. Call once.
  [[nodiscard]] Result<ExitStatus> Wait();
  // False when `timeout` passed first (negative: for ever) or `wake_fd` (-1: none) became readable.
  [[nodiscard]] Result<bool> WaitReadable(Nanos timeout, int wake_fd = -1);
  // A child that has ended already is no error.
  [[nodiscard]] Result<> Signal(int signal);

 private:
  Pid pid_;
  Fd pidfd_;
};

// Fails when the program cannot be executed (errnum ENOENT, EACCES …; but for `at_once`), with
// nothing left behind.
[[nodiscard]] Result<ChildProcess> Spawn(const SpawnOptions& options);

// Runs to the end and collects what it wrote to stdout and stderr together, at most `limit` bytes.
struct CommandOutput {
  ExitStatus status;
  std::string text;
};
[[nodiscard]] Result<CommandOutput> RunAndCollect(const std::vector<std::string>& argv,
                                                  Bytes limit = Bytes(64 << 10));

// SIGINT, SIGTERM and SIGHUP as a readable descriptor instead of death, while the object lives.
// Make it on the main thread before any other thread starts; children get default signals anyway.
class InterruptFd {
 public:
  [[nodiscard]] static Result<InterruptFd> Create();
  InterruptFd(InterruptFd&& other) noexcept;
  InterruptFd& operator=(InterruptFd&&) = delete;
  InterruptFd(const InterruptFd&) = delete;
  InterruptFd& operator=(const InterruptFd&) = delete;
  ~InterruptFd();

  [[nodiscard]] int get() const { return fd_.get(); }
  // The next pending signal, 0 when there is none. Never blocks.
  [[nodiscard]] int Take();
  // What was to be interrupted is done: from here to the end of the process they are held back.
  void TooLate() { restore_ = false; }

 private:
  InterruptFd(Fd fd, const sigset_t& previous) : fd_(std::move(fd)), previous_(previous) {}
  Fd fd_;
  sigset_t previous_;  // the mask to go back to
  bool restore_ = true;
};

}  // namespace unmoor
