// See daemon.h.
#include "os/daemon.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>

#include "os/fd.h"
#include "os/pipe.h"

namespace unmoor {
namespace {

volatile sig_atomic_t signal_seen = 0;

void CloseAllBut(std::span<const int> keep) {
  unsigned from = 3;
  for (const int fd : keep) {
    const auto kept = static_cast<unsigned>(fd);
    if (kept > from) ::close_range(from, kept - 1, 0);
    from = std::max(from, kept + 1);
  }
  ::close_range(from, ~0U, 0);
}

void DetachStreams(const std::string& log_file) {
  const Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  const Fd log(log_file.empty()
                   ? -1
                   : ::open(log_file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  ::dup2(null.get(), STDIN_FILENO);
  ::dup2(null.get(), STDOUT_FILENO);
  ::dup2(log.valid() ? log.get() : null.get(), STDERR_FILENO);
}

}  // namespace

Result<Pid> ForkProcess() {
  const pid_t pid = ::fork();
  if (pid < 0) return SystemError(errno, "cannot fork");
  return Pid{pid};
}

Result<std::optional<StartingDaemon>> ForkDaemon(std::span<const int> keep,
                                                 const std::string& log_file,
                                                 const std::string& name) {
  UNMOOR_ASSIGN(Pipe pipe, Pipe::Create());
  UNMOOR_ASSIGN(const Pid middle, ForkProcess());
  if (middle.value != 0) return std::optional(StartingDaemon(middle, std::move(pipe.reader)));
  ::setsid();
  const pid_t daemon = ::fork();
  if (daemon != 0) {
    (void)!::write(pipe.writer.get(), &daemon, sizeof(daemon));
    ::_exit(0);
  }
  DetachStreams(log_file);
  CloseAllBut(keep);
  ::prctl(PR_SET_NAME, name.c_str());
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) {
    ::signal(number, SIG_IGN);  // a program depends on us: we end when it no longer does
  }
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  ::prctl(PR_SET_TIMERSLACK, 1);  // programs stand still while we wait for their threads
  (void)pipe.reader.Release();    // closed already
  (void)pipe.writer.Release();
  return std::optional<StartingDaemon>();
}

Result<Pid> StartingDaemon::Wait() {
  if (middle_.value == 0) return MachineError("cannot start the agent");
  pid_t daemon = -1;
  const ssize_t n = ::read(pipe_.get(), &daemon, sizeof(daemon));
  ::waitpid(std::exchange(middle_, Pid{}).value, nullptr, 0);
  if (n != sizeof(daemon) || daemon < 0) return MachineError("cannot start the agent");
  return Pid{daemon};
}

Result<Pid> ForkSharingDescriptors() {
  const long pid = ::syscall(SYS_clone, CLONE_FILES | SIGCHLD, nullptr, nullptr, nullptr, 0);
  if (pid < 0) return SystemError(errno, "cannot fork");
  return Pid{static_cast<int>(pid)};
}

Result<Fd> Duplicate(int fd) {
  Fd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!copy.valid()) return SystemError(errno, "cannot duplicate a descriptor");
  return copy;
}

void ExitProcess(int code) {
  ::_exit(code);
}

void NoticeSignal() {
  ::signal(SIGUSR1, [](int) { signal_seen = 1; });
}

void IgnoreSignal() {
  ::signal(SIGUSR1, SIG_IGN);
}

bool SignalSeen() {
  return signal_seen != 0;
}

void ForgetSignal() {
  signal_seen = 0;
}

Result<std::vector<int>> WaitAnyReadable(const std::vector<int>& fds, Nanos timeout) {
  std::vector<pollfd> polls;
  for (const int fd : fds) {
    if (fd >= 0) polls.push_back({fd, POLLIN, 0});
  }
  const int ms = timeout.value < 0 ? -1 : static_cast<int>(timeout.value / 1'000'000);
  int n = 0;
  do {
    n = ::poll(polls.data(), polls.size(), ms);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return SystemError(errno, "cannot wait for descriptors");
  std::vector<int> ready;
  for (const pollfd& poll : polls) {
    if (poll.revents != 0) ready.push_back(poll.fd);
  }
  return ready;
}

}  // namespace unmoor
