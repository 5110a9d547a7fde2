// How much more memory a process may use before the kernel has to kill somebody for it.
//
// A process in a control group with a memory limit is not told when it passes that: it is killed.
// So whoever is about to use much looks first. What is left is the least of what the machine has to
// spare, and of what each limited group of the process has up to its limit and in file pages it can
// take back; less a reserve for what others need meanwhile. A group whose files cannot be read from
// here has no limit as far as we know; swap inside groups is not counted.
//
// Thread-safe.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

// A control group's directory.
struct MemoryGroup {
  std::string directory;
  bool unified = false;  // version 2
  auto operator<=>(const MemoryGroup&) const = default;
};
// Of the groups named in `memberships` (/proc/PID/cgroup) those that may limit memory, each with
// all above it, where `mounts` (/proc/self/mountinfo) shows them.
[[nodiscard]] std::vector<MemoryGroup> FindMemoryGroups(const std::string& memberships,
                                                        const std::string& mounts);

class MemoryRoom {
 public:
  explicit MemoryRoom(Pid pid) : pid_(pid) {}

  // To be called first, and again from time to time: the process may have been moved to other
  // groups, or given a limit.
  void FindGroups();
  // The caller is about to use `more`. Where that much is not there: ENOMEM, naming what lacks it,
  // and nothing is taken. Looks at the kernel's figures every few milliseconds.
  [[nodiscard]] Result<> Take(Bytes more);
  // The same, and nothing is taken in any case.
  [[nodiscard]] Result<> CanTake(Bytes more);

 private:
  void Look();

  const Pid pid_;
  std::mutex mutex_;
  std::vector<MemoryGroup> groups_;  // with a limit
  Nanos looked_;
  Bytes left_;
  std::string whose_;
};

}  // namespace unmoor
