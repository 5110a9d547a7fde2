// See hold_off.h.
#include "agent/hold_off.h"

#include <fcntl.h>

#include "os/file.h"
#include "os/file_lock.h"
#include "os/process_control.h"

namespace unmoor {
namespace {

constexpr Nanos kLook(1'000'000);
constexpr Nanos kAskPatience(50'000'000);  // an agent that looks has the lock for a moment

std::string AskingPath(Pid pid) {
  return fmt::format("/proc/{}/maps", pid.value);
}

std::string InsidePath(Pid pid) {
  return fmt::format("/proc/{}/pagemap", pid.value);
}

Result<bool> LockWithin(int fd, const std::string& path, Nanos patience) {
  const Nanos end = MonotonicNow() + patience;
  for (;;) {
    UNMOOR_ASSIGN(const bool locked, TryLock(fd, path));
    if (locked || MonotonicNow() > end) return locked;
    SleepFor(kLook);
  }
}

}  // namespace

Result<HoldOff> HoldOff::Begin(Pid pid) {
  UNMOOR_ASSIGN(Fd asking, OpenFile(AskingPath(pid), O_RDONLY));
  UNMOOR_ASSIGN(Fd inside, OpenFile(InsidePath(pid), O_RDONLY));
  UNMOOR_ASSIGN(const bool first, LockWithin(asking.get(), AskingPath(pid), kAskPatience));
  if (first) return HoldOff(pid, std::move(asking), std::move(inside));
  return MachineError("process {} is being dumped by {} already", pid.value,
                      LockHolder(asking.get()));
}

Result<bool> HoldOff::Await(Nanos patience) {
  return LockWithin(inside_.get(), InsidePath(pid_), patience);
}

bool IsHeldOff(Pid pid) {
  const auto asking = OpenFile(AskingPath(pid), O_RDONLY);
  if (!asking) return false;
  const auto free = TryLockShared(asking->get(), AskingPath(pid));
  return free && !*free;
}

Result<std::optional<Inside>> Inside::TryEnter(Pid pid) {
  UNMOOR_ASSIGN(Fd lock, OpenFile(InsidePath(pid), O_RDONLY));
  UNMOOR_ASSIGN(const bool entered, TryLock(lock.get(), InsidePath(pid)));
  if (!entered) return std::optional<Inside>();
  return std::optional<Inside>(Inside(std::move(lock)));
}

}  // namespace unmoor
