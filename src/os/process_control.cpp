// See process_control.h.
#include "os/process_control.h"

#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <ctime>

#include "os/procfs.h"

namespace unmoor {
namespace {

// linux/fs.h, from 6.7; PAGE_IS_GUARD from 6.15.
struct PagemapScanArgument {
  uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
constexpr unsigned long kPagemapScan = _IOWR('f', 16, PagemapScanArgument);
constexpr uint64_t kPageIsGuard = 1u << 8;

// linux/sched/types.h, which glibc's sched.h does not bear beside it.
struct SchedulingAttributes {
  uint32_t size, policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime, deadline, period;
};
constexpr uint64_t kShortTurn = 100'000;  // ns, the least there is

int PollMillis(Nanos timeout) {
  if (timeout.value < 0) return -1;
  return static_cast<int>(std::min<int64_t>((timeout.value + 999'999) / 1'000'000, 1 << 30));
}

}  // namespace

Result<Fd> OpenPidFd(Pid pid) {
  Fd fd(static_cast<int>(::syscall(SYS_pidfd_open, pid.value, 0)));
  if (!fd.valid()) return SystemError(errno, fmt::format("cannot open process {}", pid.value));
  return fd;
}

Result<> SendSignal(Pid pid, int signal) {
  if (::kill(pid.value, signal) != 0) {
    return SystemError(errno, fmt::format("cannot signal process {}", pid.value));
  }
  return {};
}

Result<Fd> TakeFd(int pidfd, int fd) {
  const auto taken = static_cast<int>(::syscall(SYS_pidfd_getfd, pidfd, fd, 0));
  if (taken < 0) return SystemError(errno, "cannot take a descriptor of another process");
  return Fd(taken);
}

Result<WaitOutcome> WaitForExit(int pidfd, Nanos timeout, int interrupt) {
  const Nanos end = MonotonicNow() + timeout;
  for (;;) {
    const Nanos left = timeout.value < 0 ? Nanos(-1) : std::max(end - MonotonicNow(), Nanos(0));
    pollfd fds[] = {{pidfd, POLLIN, 0}, {interrupt, POLLIN, 0}};
    const int n = ::poll(fds, 2, PollMillis(left));
    if (n < 0 && errno != EINTR) return SystemError(errno, "cannot wait for a process");
    if (n > 0 && fds[0].revents != 0) return WaitOutcome::kExited;
    if (n > 0 && fds[1].revents != 0) return WaitOutcome::kInterrupted;
    if (n == 0) return WaitOutcome::kTimeout;
  }
}

Result<bool> WaitReadable(int fd, Nanos timeout) {
  pollfd item{fd, POLLIN, 0};
  const Nanos began = MonotonicNow();
  for (;;) {
    const Nanos left = timeout.value < 0 ? timeout : timeout - (MonotonicNow() - began);
    const bool over = timeout.value >= 0 && left.value <= 0;
    const int n = ::poll(&item, 1, over ? 0 : PollMillis(left));
    if (n < 0 && errno != EINTR) return SystemError(errno, "poll");
    if (n > 0) return true;
    if (n == 0 || over) return false;
  }
}

Result<> BecomeSubreaper(bool on) {
  if (::prctl(PR_SET_CHILD_SUBREAPER, on ? 1 : 0, 0, 0, 0) != 0) {
    return SystemError(errno, "cannot become the reaper of restored processes");
  }
  return {};
}

std::optional<int> ReapChild(Pid pid) {
  int status = 0;
  if (::waitpid(pid.value, &status, WNOHANG | __WALL) != pid.value) return std::nullopt;
  return status;
}

void SignalDescendants(int signal) {
  const auto tree = ReadTree(OwnPid());
  if (!tree) return;
  for (const Pid pid : *tree) {
    if (pid != OwnPid()) ::kill(pid.value, signal);
  }
}

void KillDescendants() {
  // Bounded: a task in uninterruptible sleep is left to init.
  for (int round = 0; round < 400; ++round) {
    SignalDescendants(SIGKILL);
    while (::waitpid(-1, nullptr, WNOHANG | __WALL) > 0) {
    }
    const auto left = ReadTree(OwnPid());
    if (!left || left->size() <= 1) return;
    SleepFor(Nanos(5'000'000));
  }
}

bool HasGuardPages(int pagemap_fd, VaddrRange range) {
  uint64_t region[3] = {};
  PagemapScanArgument scan{};
  scan.size = sizeof scan;
  scan.start = range.begin.value;
  scan.end = range.end.value;
  // SAFETY: handed to the kernel as a number; it writes at most one region of 24 bytes.
  scan.vec = reinterpret_cast<uint64_t>(region);
  scan.vec_len = 1;
  scan.max_pages = 1;
  scan.category_mask = kPageIsGuard;
  scan.return_mask = kPageIsGuard;
  return ::ioctl(pagemap_fd, kPagemapScan, &scan) > 0;
}

int ProcessGroup(Pid pid) {
  return ::getpgid(pid.value);
}

int Session(Pid pid) {
  return ::getsid(pid.value);
}

bool IsProcessGroup(Pid id) {
  return id.value > 1 && (::kill(-id.value, 0) == 0 || errno == EPERM);
}

uint32_t OwnUid() {
  return ::geteuid();
}

void TakeShortTurns(bool on) {
  SchedulingAttributes attributes{};
  attributes.size = sizeof(attributes);
  if (::syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) != 0) return;
  if (attributes.policy != SCHED_OTHER) return;
  attributes.runtime = on ? kShortTurn : 0;
  (void)::syscall(SYS_sched_setattr, 0, &attributes, 0);
}

void AllowMoreDescriptors() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  (void)::setrlimit(RLIMIT_NOFILE, &limit);
}

Pid OwnPid() {
  return Pid{static_cast<int>(::getpid())};
}

Pid ParentPid() {
  return Pid{::getppid()};
}

Urgent::Urgent() {
  const sched_param parameter{1};
  (void)::sched_setscheduler(0, SCHED_FIFO, &parameter);
}

Urgent::~Urgent() {
  const sched_param parameter{0};
  (void)::sched_setscheduler(0, SCHED_OTHER, &parameter);
}

Nanos MonotonicNow() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return Nanos(int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec);
}

Nanos WallClockNow() {
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return Nanos(int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec);
}

// Until a point in time: what is left of a span does not shrink while a signal's handler runs, and
// a freeze of the threads that comes often enough would make the sleep last for ever.
void SleepFor(Nanos time) {
  const Nanos until = MonotonicNow() + time;
  const timespec at{until.value / 1'000'000'000, until.value % 1'000'000'000};
  while (::clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, nullptr) == EINTR) {
  }
}

bool IsTerminal(int fd) {
  return ::isatty(fd) == 1;
}

int TerminalWidth(int fd) {
  winsize size{};
  return ::ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace unmoor
