// See spawn.h.
#include "os/spawn.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "os/pipe.h"

extern char** environ;

namespace unmoor {
namespace {

// Owns what posix_spawn wants initialised and destroyed.
struct SpawnActions {
  SpawnActions() {
    ::posix_spawn_file_actions_init(&files);
    ::posix_spawnattr_init(&attributes);
  }
  SpawnActions(const SpawnActions&) = delete;
  SpawnActions& operator=(const SpawnActions&) = delete;
  ~SpawnActions() {
    ::posix_spawn_file_actions_destroy(&files);
    ::posix_spawnattr_destroy(&attributes);
  }
  posix_spawn_file_actions_t files;
  posix_spawnattr_t attributes;
};

sigset_t InterruptSignals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&set, signal);
  return set;
}

// A descriptor of ours, close-on-exec, that is to be `as` in the child.
struct Placement {
  Fd copy;
  int as = -1;
};
using Placements = std::vector<Placement>;

// Sources first move out of the way of every target, so that the order of the dup2s is free.
Result<Placements> PlaceDescriptors(const SpawnOptions& options) {
  std::vector<InheritedFd> wanted = options.fds;
  if (options.stdin_fd) wanted.push_back({*options.stdin_fd, 0});
  if (options.stdout_fd) wanted.push_back({*options.stdout_fd, 1});
  if (options.stderr_fd) wanted.push_back({*options.stderr_fd, 2});
  int above = 3;
  for (const InheritedFd& fd : wanted) above = std::max(above, fd.as + 1);
  Placements placements;
  for (const InheritedFd& fd : wanted) {
    Fd copy(::fcntl(fd.fd, F_DUPFD_CLOEXEC, above));
    if (!copy.valid())
      return SystemError(errno, fmt::format("cannot duplicate descriptor {}", fd.fd));
    placements.push_back({std::move(copy), fd.as});
  }
  return placements;
}

// For exec: they point into what is given, and end with a null.
// SAFETY: exec takes char* for historical reasons and does not write through it.
std::vector<char*> Pointers(const std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (const std::string& string : strings) pointers.push_back(const_cast<char*>(string.c_str()));
  pointers.push_back(nullptr);
  return pointers;
}

std::vector<char*> WholeEnvironment(const SpawnOptions& options) {
  std::vector<char*> all = Pointers(options.environment);
  all.pop_back();
  for (char** variable = environ; variable != nullptr && *variable != nullptr; ++variable) {
    all.push_back(*variable);
  }
  all.push_back(nullptr);
  return all;
}

// What is executed: argv and envp.
struct Program {
  std::vector<char*> argv;
  std::vector<char*> environment;
};

Result<pid_t> SpawnAndWait(const SpawnOptions& options, const Placements& placements,
                           const Program& program) {
  SpawnActions actions;
  for (const Placement& placement : placements) {
    ::posix_spawn_file_actions_adddup2(&actions.files, placement.copy.get(), placement.as);
  }
  sigset_t all;
  sigset_t none;
  sigfillset(&all);
  sigemptyset(&none);
  ::posix_spawnattr_setsigdefault(&actions.attributes, &all);
  ::posix_spawnattr_setsigmask(&actions.attributes, &none);
  int flags = POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK;
  if (options.own_process_group) flags |= POSIX_SPAWN_SETPGROUP;
  if (options.new_session) flags |= POSIX_SPAWN_SETSID;
  ::posix_spawnattr_setflags(&actions.attributes, static_cast<short>(flags));
  pid_t pid = 0;
  const int error = ::posix_spawnp(&pid, program.argv[0], &actions.files, &actions.attributes,
                                   program.argv.data(), program.environment.data());
  if (error != 0) return SystemError(error, fmt::format("cannot run {}", options.argv[0]));
  return pid;
}

// In a child of fork: only what is safe in a signal handler too.
[[noreturn]] void Execute(const SpawnOptions& options, const Placements& placements,
                          const Program& program) {
  for (const Placement& placement : placements) ::dup2(placement.copy.get(), placement.as);
  if (options.new_session) ::setsid();
  if (options.own_process_group) ::setpgid(0, 0);
  for (int number = 1; number <= SIGRTMAX; ++number) ::signal(number, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  ::execvpe(program.argv[0], program.argv.data(), program.environment.data());
  const std::array<const char*, 5> line = {"cannot run ", program.argv[0], ": ",
                                           ::strerrordesc_np(errno), "\n"};
  for (const char* const part : line) {
    (void)!::write(STDERR_FILENO, part, std::strlen(part));
  }
  ::_exit(127);
}

Result<pid_t> ForkAndExecute(const SpawnOptions& options, const Placements& placements,
                             const Program& program) {
  const pid_t pid = ::fork();
  if (pid < 0) return SystemError(errno, fmt::format("cannot run {}", options.argv[0]));
  if (pid == 0) Execute(options, placements, program);
  return pid;
}

}  // namespace

Result<ExitStatus> ChildProcess::Wait() {
  int status = 0;
  while (::waitpid(pid_.value, &status, 0) < 0) {
    if (errno != EINTR)
      return SystemError(errno, fmt::format("cannot wait for process {}", pid_.value));
  }
  ExitStatus result;
  if (WIFSIGNALED(status)) {
    result.signal = WTERMSIG(status);
  } else {
    result.code = WEXITSTATUS(status);
  }
  return result;
}

Result<bool> ChildProcess::WaitReadable(Nanos timeout, int wake_fd) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::nanoseconds(timeout.value);
  for (;;) {
    int wait_ms = -1;
    if (timeout.value >= 0) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now()).count();
      wait_ms = static_cast<int>(std::clamp<int64_t>(left, 0, INT32_MAX));
    }
    pollfd waits[2] = {{pidfd_.get(), POLLIN, 0}, {wake_fd, POLLIN, 0}};
    const int n = ::poll(waits, 2, wait_ms);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return SystemError(errno, "cannot poll");
    return waits[0].revents != 0;
  }
}

Result<> ChildProcess::Signal(int signal) {
  if (::syscall(SYS_pidfd_send_signal, pidfd_.get(), signal, nullptr, 0) != 0 && errno != ESRCH) {
    return SystemError(errno, fmt::format("cannot signal process {}", pid_.value));
  }
  return {};
}

Result<ChildProcess> Spawn(const SpawnOptions& options) {
  UNMOOR_CHECK(!options.argv.empty());
  UNMOOR_ASSIGN(const Placements placements, PlaceDescriptors(options));
  const Program program{Pointers(options.argv), WholeEnvironment(options)};
  UNMOOR_ASSIGN(const pid_t pid, options.at_once ? ForkAndExecute(options, placements, program)
                                                 : SpawnAndWait(options, placements, program));
  // The child is ours and unreaped, so its pid still means it.
  Fd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!pidfd.valid()) {
    const int errnum = errno;
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    return SystemError(errnum, "cannot open a pidfd");
  }
  return ChildProcess(Pid{pid}, std::move(pidfd));
}

Result<CommandOutput> RunAndCollect(const std::vector<std::string>& argv, Bytes limit) {
  UNMOOR_ASSIGN(Pipe pipe, Pipe::Create());
  const Fd null(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  SpawnOptions options;
  options.argv = argv;
  options.stdin_fd = null.get();
  options.stdout_fd = pipe.writer.get();
  options.stderr_fd = pipe.writer.get();
  UNMOOR_ASSIGN(ChildProcess child, Spawn(options));
  pipe.writer.Reset();

  CommandOutput output;
  char buffer[4096];
  for (;;) {
    const ssize_t n = ::read(pipe.reader.get(), buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    const size_t room = limit.value - output.text.size();
    output.text.append(buffer, std::min(static_cast<size_t>(n), room));
  }
  UNMOOR_ASSIGN(output.status, child.Wait());
  return output;
}

Result<InterruptFd> InterruptFd::Create() {
  const sigset_t signals = InterruptSignals();
  Fd fd(::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd.valid()) return SystemError(errno, "cannot make a signalfd");
  sigset_t previous;
  ::pthread_sigmask(SIG_BLOCK, &signals, &previous);
  return InterruptFd(std::move(fd), previous);
}

InterruptFd::InterruptFd(InterruptFd&& other) noexcept = default;

InterruptFd::~InterruptFd() {
  if (fd_.valid() && restore_) ::pthread_sigmask(SIG_SETMASK, &previous_, nullptr);
}

int InterruptFd::Take() {
  signalfd_siginfo info{};
  if (::read(fd_.get(), &info, sizeof info) != static_cast<ssize_t>(sizeof info)) return 0;
  return static_cast<int>(info.ssi_signo);
}

}  // namespace unmoor
