// `unmoor status` and `unmoor wait`. Exit codes: 0 READY, 1 LATER, 2 NEVER, 3 an error.
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "agent/agent.h"
#include "command.h"
#include "progress.h"

namespace unmoor::cli {
namespace {

constexpr int kExitError = 3;

struct StatusArguments {
  std::string pid;
  std::string timeout;
  bool json = false;
};

constexpr char kStatusFooter[] =
    "\nREADY  nothing maps an image any more (layers/*.pages, pages-N.img): it may be dumped, the\n"
    "       image may be deleted\n"
    "LATER  it still maps an image; wait, or run 'unmoor remap -t PID'\n"
    "NEVER  it cannot be checkpointed at all (its image is damaged, say); the reason follows\n"
    "\nExamples:\n"
    "  unmoor status -t 4711\n"
    "  unmoor status -t 4711 --json | jq .direct_mapped_bytes\n"
    "\nExit codes: 0 READY, 1 LATER, 2 NEVER, 3 error (no such process, wrong use).\n";

constexpr char kWaitFooter[] =
    "\nExamples:\n"
    "  unmoor wait -t 4711 && rm -r /var/tmp/image\n"
    "  unmoor wait -t 4711 --timeout 30\n"
    "\nExit codes: 0 READY, 1 LATER (the time is up), 2 NEVER, 3 error (no such process, wrong "
    "use).\n";

const char* Word(Status status) {
  switch (status) {
    case Status::kReady:
      return "READY";
    case Status::kLater:
      return "LATER";
    case Status::kNever:
      return "NEVER";
  }
  return "NEVER";
}

int PrintStatus(Pid pid, const ProcessStatus& status, bool json) {
  if (json) {
    nlohmann::json object = {{"pid", pid.value},
                             {"status", Word(status.status)},
                             {"reason", status.reason},
                             {"direct_mapped_bytes", status.direct_mapped.value},
                             {"direct_mapped_data_bytes", status.direct_mapped_data.value},
                             {"images", status.images}};
    if (status.agent) object["agent"] = status.agent->value;
    if (status.progress) {
      const RemapReport& progress = *status.progress;
      object["progress"] = {{"total_bytes", progress.total.value},
                            {"done_bytes", progress.done.value},
                            {"dropped_bytes", progress.dropped.value},
                            {"verified_bytes", progress.verified.value},
                            {"windows", progress.windows},
                            {"guarded_windows", progress.guarded},
                            {"aborted_windows", progress.aborted},
                            {"longest_pause_ns", progress.longest_pause.value},
                            {"elapsed_ns", progress.elapsed.value},
                            {"bytes_per_second", progress.copy_rate}};
    }
    PrintJson(object);
  } else {
    std::string text = Word(status.status);
    if (!status.reason.empty()) text += " " + status.reason;
    if (status.status == Status::kLater && status.progress) {
      const std::string note = DescribeProgress(*status.progress);
      if (!note.empty()) text += " (" + note + ")";
    }
    std::printf("%s\n", text.c_str());
  }
  return static_cast<int>(status.status);
}

int Fail(const Error& error, bool json) {
  if (json) {
    PrintJson({{"error", error.message()}, {"exit_code", kExitError}});
  } else {
    std::fprintf(stderr, "unmoor: %s\n", error.message().c_str());
  }
  return kExitError;
}

int RunStatus(const StatusArguments& arguments) {
  const auto pid = ParsePid(arguments.pid);
  if (!pid) return Fail(pid.error(), arguments.json);
  const auto status = QueryStatus(*pid);
  if (!status) return Fail(status.error(), arguments.json);
  return PrintStatus(*pid, *status, arguments.json);
}

int RunWait(const StatusArguments& arguments) {
  const auto pid = ParsePid(arguments.pid);
  if (!pid) return Fail(pid.error(), arguments.json);
  Nanos timeout(-1);
  if (!arguments.timeout.empty()) {
    const auto parsed = ParseDuration(arguments.timeout, 1'000'000'000);
    if (!parsed) return Fail(parsed.error(), arguments.json);
    timeout = *parsed;
  }
  ProgressBar bar("remap", arguments.json);
  const auto status = WaitReady(*pid, timeout, [&](const ProcessStatus& now) {
    // Nobody remaps it yet: all of it is still to do.
    const RemapReport report = now.progress.value_or(RemapReport{});
    const bool begun = report.total.value > 0;
    bar.Show(report.done + report.dropped, begun ? report.total : now.direct_mapped_data,
             DescribeProgress(report));
  });
  bar.Clear();
  if (!status) return Fail(status.error(), arguments.json);
  return PrintStatus(*pid, *status, arguments.json);
}

}  // namespace

Action ConfigureStatus(CLI::App& app) {
  const auto arguments = std::make_shared<StatusArguments>();
  SetUsage(app, "Usage: unmoor status -t PID [--json]");
  app.add_option("-t,--tree", arguments->pid, "The process")->required()->option_text("PID");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(kStatusFooter);
  return [arguments](const Invocation&) { return RunStatus(*arguments); };
}

Action ConfigureWait(CLI::App& app) {
  const auto arguments = std::make_shared<StatusArguments>();
  SetUsage(app, "Usage: unmoor wait -t PID [--timeout SECONDS] [--json]");
  app.add_option("-t,--tree", arguments->pid, "The process")->required()->option_text("PID");
  app.add_option("--timeout", arguments->timeout, "Give up after so long (default: never)")
      ->option_text("SECONDS");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(kWaitFooter);
  return [arguments](const Invocation&) { return RunWait(*arguments); };
}

}  // namespace unmoor::cli
