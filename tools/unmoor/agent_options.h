// The options restore and remap share: --max-pause, --thp, --guard, --no-verify.
#pragma once

#include <CLI/App.hpp>
#include <string>

#include "agent/agent.h"
#include "base/result.h"

namespace unmoor::cli {

struct AgentArguments {
  std::string max_pause = "1ms";
  std::string thp = "auto";
  std::string guard = "freeze";
  bool no_verify = false;
};

void AddAgentOptions(CLI::App& app, AgentArguments& arguments);
[[nodiscard]] Result<AgentOptions> ToAgentOptions(const AgentArguments& arguments);

}  // namespace unmoor::cli
