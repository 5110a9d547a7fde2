// `unmoor remap`: makes a process independent of its image, in the foreground.
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "agent/agent.h"
#include "agent_options.h"
#include "base/log.h"
#include "command.h"
#include "progress.h"

namespace unmoor::cli {
namespace {

struct RemapArguments {
  std::string pid;
  AgentArguments agent;
  bool verbose = false;
  bool json = false;
};

constexpr char kFooter[] =
    "\nThe program keeps running; its threads are stopped for short moments only. Works on a "
    "process\n"
    "whose agent was killed, one restored with --remap off, or one another tool mapped. Killing "
    "this\n"
    "command leaves the program unharmed; running it again finishes the work.\n"
    "\nExamples:\n"
    "  unmoor remap -t 4711\n"
    "  unmoor remap -t 4711 --max-pause 500us --json\n"
    "\nExit codes: 0 independent, 1 the machine failed, 2 wrong use.\n";

nlohmann::json ToJson(const RemapReport& report) {
  return {
      {"total_bytes", report.total.value},       {"done_bytes", report.done.value},
      {"dropped_bytes", report.dropped.value},   {"windows", report.windows},
      {"guarded_windows", report.guarded},       {"aborted_windows", report.aborted},
      {"verified_bytes", report.verified.value}, {"longest_pause_ns", report.longest_pause.value},
      {"elapsed_ns", report.elapsed.value},      {"bytes_per_second", report.copy_rate}};
}

int RunRemap(const RemapArguments& arguments) {
  if (arguments.verbose) InitLogging(2);
  const auto pid = ParsePid(arguments.pid);
  if (!pid) return Report(pid.error(), arguments.json);
  const auto options = ToAgentOptions(arguments.agent);
  if (!options) return Report(options.error(), arguments.json);

  ProgressBar bar("remap", arguments.json);
  const auto report = RemapProcess(*pid, *options, [&](const RemapReport& progress) {
    bar.Show(progress.done + progress.dropped, progress.total, DescribeProgress(progress));
  });
  bar.Clear();
  if (!report) return Report(report.error(), arguments.json);
  const auto status = QueryStatus(*pid);
  if (arguments.json) {
    nlohmann::json object = ToJson(*report);
    if (status) object["ready"] = status->status == Status::kReady;
    PrintJson(object);
  } else {
    const std::string text =
        fmt::format("remapped {} of {} in {}, {} windows, longest pause {}\n",
                    HumanBytes(report->done), HumanBytes(report->total), HumanTime(report->elapsed),
                    report->windows, HumanTime(report->longest_pause));
    Print(text);
  }
  if (status && status->status != Status::kReady) {
    if (!arguments.json) std::fprintf(stderr, "unmoor: %s\n", status->reason.c_str());
    return kExitMachine;
  }
  return kExitSuccess;
}

}  // namespace

Action ConfigureRemap(CLI::App& app) {
  const auto arguments = std::make_shared<RemapArguments>();
  SetUsage(app, "Usage: unmoor remap -t PID [OPTIONS]");
  app.add_option("-t,--tree", arguments->pid, "The process")->required()->option_text("PID");
  AddAgentOptions(app, arguments->agent);
  app.add_flag("-v,--verbose", arguments->verbose, "Say more");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(kFooter);
  return [arguments](const Invocation&) { return RunRemap(*arguments); };
}

}  // namespace unmoor::cli
