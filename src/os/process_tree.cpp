// See process_tree.h.
#include "os/process_tree.h"

#include <algorithm>
#include <csignal>
#include <vector>

#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor {

void KillTree(Pid root) {
  constexpr int kRounds = 200;
  std::vector<Pid> known;
  for (int round = 0, quiet = 0; round < kRounds && quiet < 2; ++round) {
    const auto tree = ReadTree(root);
    if (!tree) break;
    ++quiet;
    for (const Pid pid : *tree) {
      if (std::ranges::find(known, pid) != known.end()) continue;
      (void)SendSignal(pid, SIGSTOP);
      known.push_back(pid);
      quiet = 0;
    }
    SleepFor(Nanos(1'000'000));  // for those in the middle of a fork to stop
  }
  for (const Pid pid : known) (void)SendSignal(pid, SIGKILL);
}

}  // namespace unmoor
