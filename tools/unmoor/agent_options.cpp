// See agent_options.h.
#include "agent_options.h"

#include "command.h"

namespace unmoor::cli {

void AddAgentOptions(CLI::App& app, AgentArguments& arguments) {
  app.add_option("--max-pause", arguments.max_pause,
                 "How long threads may be stopped at a time, about (default 1ms)")
      ->option_text("TIME");
  app.add_option("--thp", arguments.thp,
                 "auto: huge pages where whole ones are in use; never: small pages only")
      ->option_text("auto|never");
  app.add_option(
         "--guard", arguments.guard,
         "freeze: all threads stand still while a batch is swapped; fault: only those that write\n"
         "to it or make a system call")
      ->option_text("freeze|fault");
  app.add_flag("--no-verify", arguments.no_verify,
               "Do not hold what is remapped against the image's hashes");
}

Result<AgentOptions> ToAgentOptions(const AgentArguments& arguments) {
  AgentOptions options;
  options.verify = !arguments.no_verify;
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
  if (arguments.guard == "freeze") {
    options.guard = GuardPolicy::kFreeze;
  } else if (arguments.guard == "fault") {
    options.guard = GuardPolicy::kFault;
  } else {
    return UserError("--guard is freeze or fault, not '{}'", arguments.guard);
  }
  return options;
}

}  // namespace unmoor::cli
