// See fault_point.h. name:error@* fails on every passage; commas part several faults.
//
// A point named "kernel.…" stands where an ability of the kernel is tried, and fails as a kernel
// without it would: so the ways around that can be tested where the kernel has it.
#include "base/fault_point.h"

#ifdef UNMOOR_FAULT_POINTS
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <deque>
#include <string>
#include <string_view>

namespace unmoor {
namespace {

struct Fault {
  explicit Fault(std::string_view text) {
    const size_t colon = text.rfind(':');
    if (colon == std::string_view::npos) return;
    name = text.substr(0, colon);
    const std::string_view action = text.substr(colon + 1);
    const size_t at = action.find('@');
    if (action.substr(0, at) == "kill") signal = SIGKILL;
    if (action.substr(0, at) == "stop") signal = SIGSTOP;
    if (at == std::string_view::npos) return;
    const std::string which(action.substr(at + 1));
    passage = which == "*" ? kEvery : std::atoi(which.c_str());
  }

  static constexpr int kEvery = 0;
  std::string name;
  int signal = 0;  // 0: the point fails
  int passage = 1;
  std::atomic<int> passages = 0;
};

std::deque<Fault> ReadFaults() {
  std::deque<Fault> faults;
  const char* const text = std::getenv("UNMOOR_FAULT");
  if (text == nullptr) return faults;
  for (std::string_view rest = text; !rest.empty();) {
    const size_t comma = std::min(rest.find(','), rest.size());
    faults.emplace_back(rest.substr(0, comma));
    rest.remove_prefix(std::min(comma + 1, rest.size()));
  }
  return faults;
}

}  // namespace

Result<> FaultPoint(const char* name) {
  static std::deque<Fault> faults = ReadFaults();
  for (Fault& fault : faults) {
    if (fault.name != name) continue;
    const int passage = ++fault.passages;
    if (fault.passage != Fault::kEvery && fault.passage != passage) continue;
    if (fault.signal == 0) return MachineError("fault injected at {}", name);
    ::kill(::getpid(), fault.signal);
  }
  return {};
}

}  // namespace unmoor
#endif
