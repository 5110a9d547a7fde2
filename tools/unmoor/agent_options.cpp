// See agent_options.h.
#include "agent_options.h"

#include "command.h"

namespace unmoor::cli {

void AddAgentOptions(CLI::App& app, AgentArguments& arguments) {
  app.add_option("--max-pause", arguments.max_pause,
                 "No thread is stopped for longer at a time (default 1ms)")
      ->option_text("TIME");
  app.add_option("--thp", arguments.thp,
                 "auto: huge pages where whole ones are in use; never: small pages only")
      ->option_text("auto|never");
  app.add_option("--guard", arguments.guard, "How a batch is kept still: freeze, the only one yet")
      ->option_text("freeze");
}

Result<AgentOptions> ToAgentOptions(const AgentArguments& arguments) {
  AgentOptions options;
  UNMOOR_ASSIGN(options.max_pause, ParseDuration(arguments.max_pause, 1'000'000));
  if (options.max_pause < Nanos(50'000)) {
    return UserError("--max-pause {} is too short to do anything in; 50us is the least",
                     arguments.max_pause);
  }
  if (arguments.thp == "auto") {
    options.thp = ThpPolicy::kAuto;
  } else if (arguments.thp == "never") {
    options.thp = ThpPolicy::kNever;
  } else {
    return UserError("--thp is auto or never, not '{}'", arguments.thp);
  }
  if (arguments.guard != "freeze") {
    return UserError("--guard {} is not available here; the only one is freeze", arguments.guard);
  }
  return options;
}

}  // namespace unmoor::cli
