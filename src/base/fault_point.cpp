// See fault_point.h.
#include "base/fault_point.h"

#ifdef UNMOOR_FAULT_POINTS
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <string>

namespace unmoor {
namespace {

struct Plan {
  std::string name;
  bool kill = false;
  int passage = 1;
};

Plan ReadPlan() {
  Plan plan;
  const char* text = std::getenv("UNMOOR_FAULT");
  if (text == nullptr) return plan;
  const std::string spec = text;
  const size_t colon = spec.rfind(':');
  if (colon == std::string::npos) return plan;
  plan.name = spec.substr(0, colon);
  std::string action = spec.substr(colon + 1);
  if (const size_t at = action.find('@'); at != std::string::npos) {
    plan.passage = std::atoi(action.c_str() + at + 1);
    action.resize(at);
  }
  plan.kill = action == "kill";
  return plan;
}

}  // namespace

Result<> FaultPoint(const char* name) {
  static const Plan plan = ReadPlan();
  static std::atomic<int> passages = 0;
  if (plan.name != name || ++passages != plan.passage) return {};
  if (plan.kill) ::kill(::getpid(), SIGKILL);
  return MachineError("fault injected at {}", name);
}

}  // namespace unmoor
#endif
