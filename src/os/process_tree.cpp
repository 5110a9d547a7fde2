// See process_tree.h.
#include "os/process_tree.h"

#include <algorithm>
#include <csignal>
#include <vector>

#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor {
namespace {

// Sleeps in a vfork, say: it does not stop before the child goes on, and has it already.
bool IsAsleep(Pid pid) {
  const auto calls = ReadThreadCalls(pid);
  return !calls || calls->runnable == 0;
}

}  // namespace

void KillTree(Pid root) {
  constexpr Nanos kLookAgain(1'000'000);
  constexpr Nanos kToStop(100'000'000);
  constexpr Nanos kPatience(10'000'000'000);
  const Nanos began = MonotonicNow();
  Nanos last_found = began;
  std::vector<Pid> known = {root};
  (void)SendSignal(root, SIGSTOP);
  // Until all stand and none was born before they did: one in the middle of a fork, for want of a
  // CPU, has a child only when it gets to the end of it.
  for (bool stood = false; MonotonicNow() - began < kPatience; SleepFor(kLookAgain)) {
    const size_t before = known.size();
    for (size_t i = 0; i < known.size(); ++i) {
      for (const Pid child : ReadChildren(known[i]).value_or(std::vector<Pid>())) {
        if (std::ranges::find(known, child) != known.end()) continue;
        (void)SendSignal(child, SIGSTOP);
        known.push_back(child);
        last_found = MonotonicNow();
      }
    }
    if (stood && known.size() == before) break;
    const bool had_time = MonotonicNow() - last_found > kToStop;
    stood = std::ranges::all_of(known, [had_time](Pid pid) {
      return IsStopped(pid).value_or(true) || (had_time && IsAsleep(pid));
    });
  }
  for (const Pid pid : known) (void)SendSignal(pid, SIGKILL);
}

}  // namespace unmoor
