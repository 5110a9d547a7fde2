// See free_ids.h.
#include "restore/free_ids.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor {
namespace {

// A program just killed keeps its id until it has ended and its parent has reaped it.
constexpr Nanos kZombiePatience{5'000'000'000};
constexpr Nanos kDyingPatience{250'000'000};
constexpr Nanos kLookAgain{2'000'000};

// A process by which an id is taken.
struct Taker {
  ProcessInfo process;
  const char* as = "in use by";

  [[nodiscard]] std::string Words(Pid id) const {
    const bool itself = process.pid == id;
    if (process.state == 'Z') {
      return fmt::format(
          "process id {} is still taken by the zombie of {}{}; its parent {} has to reap it first, "
          "or restore below 'unshare -p'",
          id.value, process.name, itself ? "" : fmt::format(" (process {})", process.pid.value),
          process.parent.value);
    }
    return fmt::format(
        "process id {} is {} {}{}; end that process first, or restore below 'unshare -p'", id.value,
        as, process.name, itself ? "" : fmt::format(" (process {})", process.pid.value));
  }
};

// Those that are ending last: they are not what has to be told.
std::optional<Taker> FindMember(Pid id) {
  std::optional<Taker> found;
  for (const Pid pid : ListProcesses()) {
    const bool group = ProcessGroup(pid) == id.value;
    if (!group && Session(pid) != id.value) continue;
    const auto process = ReadProcess(pid);
    if (!process) continue;
    Taker taker{*process, group ? "still the process group of" : "still the session of"};
    if (!taker.process.ending()) return taker;
    found = std::move(taker);
  }
  return found;
}

std::optional<Taker> FindTaker(Pid id) {
  if (const auto process = ReadProcess(id)) return Taker{*process};
  return IsProcessGroup(id) ? FindMember(id) : std::nullopt;
}

}  // namespace

Result<> AwaitFreeIds(std::span<const Pid> ids) {
  const Nanos begin = MonotonicNow();
  for (const Pid id : ids) {
    std::optional<Taker> taker = FindTaker(id);
    while (taker) {
      const Nanos patience = taker->process.ending() ? kZombiePatience : kDyingPatience;
      if (MonotonicNow() - begin > patience) {
        const auto kind = taker->process.ending() ? ErrorKind::kMachine : ErrorKind::kUser;
        return Failure(Error(kind, 0, taker->Words(id)));
      }
      SleepFor(kLookAgain);
      taker = FindTaker(id);
    }
  }
  return {};
}

std::string WhoTakesId(std::span<const Pid> ids) {
  for (const Pid id : ids) {
    std::optional<Taker> taker = FindTaker(id);
    if (!taker) taker = FindMember(id);
    if (taker) return taker->Words(id);
  }
  return {};
}

}  // namespace unmoor
