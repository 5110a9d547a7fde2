// `unmoor restore`.
#include "restore/restore.h"
#include "store/import.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "agent_options.h"
#include "base/log.h"
#include "command.h"
#include "os/file.h"
#include "progress.h"
#include "record.h"

namespace unmoor::cli {
namespace {

constexpr int kExitInterrupted = 130;

struct RestoreArguments {
  std::string directory;
  std::string mode = "direct";
  std::string remap = "background";
  std::string pidfile;
  std::string criu;
  std::string agent_log;
  std::string record_time;
  AgentArguments agent;
  bool record = false;
  bool no_prefetch = false;
  bool detached = false;
  bool verbose = false;
  bool json = false;
};

constexpr char kFooter[] =
    "\nThe program's memory is mapped from the image, so it runs at once; in the background it is\n"
    "then made independent of the image (unmoor status -t PID). Until it is READY\n"
    "no file in DIR may be changed; DIR may be moved or removed.\n"
    "\n  --mode direct      run at once, remap in the background (default)\n"
    "  --mode lazy        run at once, bring pages when they are touched, and in the background\n"
    "  --mode eager       bring all of its memory first, then run; READY at once\n"
    "                     (lazy and eager: of a packed DIR without unpacking it)\n"
    "  --mode auto        the one that fits this image and machine; says which, and why\n"
    "  --remap off        stay mapped; 'unmoor remap -t PID' does it later\n"
    "\nExamples:\n"
    "  unmoor restore -D /var/tmp/image -d\n"
    "  unmoor restore -D /var/tmp/image -d --mode eager --pidfile /run/app.pid\n"
    "  unmoor restore -D /var/tmp/image -- --shell-job\n"
    "\nExit codes: with -d 0 once the program runs; without, the program's own (128 + signal).\n"
    "1 the machine failed, 2 wrong use; nothing of the program is left running then.\n";

Result<RestoreOptions> ToOptions(const RestoreArguments& arguments, const Invocation& invocation) {
  RestoreOptions options;
  options.directory = arguments.directory;
  UNMOOR_ASSIGN(options.agent, ToAgentOptions(arguments.agent));
  if (arguments.mode == "eager") {
    options.mode = RestoreMode::kEager;
  } else if (arguments.mode == "lazy") {
    options.mode = RestoreMode::kLazy;
  } else if (arguments.mode == "auto") {
    options.mode = RestoreMode::kAuto;
  } else if (arguments.mode != "direct") {
    return UserError("--mode is direct, lazy, eager or auto, not '{}'", arguments.mode);
  }
  if (arguments.remap != "background" && arguments.remap != "off") {
    return UserError("--remap is background or off, not '{}'", arguments.remap);
  }
  options.agent.remap = arguments.remap == "background";
  if (!options.agent.remap && options.mode == RestoreMode::kEager) {
    return UserError("--mode eager maps nothing, so --remap off means nothing there");
  }
  if (!options.agent.remap && options.mode == RestoreMode::kAuto) {
    return UserError(
        "--mode auto may choose one that maps nothing, so --remap off needs a --mode direct");
  }
  if (!options.agent.remap && options.mode == RestoreMode::kLazy) {
    return UserError("--mode lazy maps nothing, so --remap off means nothing there");
  }
  if (arguments.record && options.mode != RestoreMode::kDirect) {
    return UserError(
        "--record sees what is touched while it is mapped, so only under --mode direct");
  }
  if (!arguments.record_time.empty() && !arguments.record) {
    return UserError("--record-time says how long --record is to record");
  }
  options.prefetch = !arguments.no_prefetch && !arguments.record;
  options.recorded = arguments.record;
  options.agent.log_file = arguments.agent_log;
  options.pidfile = arguments.pidfile;
  options.criu_arguments = invocation.criu_arguments;
  options.verbose = arguments.verbose;
  if (!arguments.criu.empty()) options.criu = arguments.criu;
  return options;
}

void PrintReport(const RestoreReport& report) {
  nlohmann::json tasks = nlohmann::json::array();
  for (const Pid pid : report.tasks) tasks.push_back(pid.value);
  nlohmann::json object = {
      {"pid", report.root.value},          {"mode", ToString(report.mode)},
      {"tasks", std::move(tasks)},         {"mapped_bytes", report.mapped.value},
      {"layer_bytes", report.data.value},  {"loaded_bytes", report.loaded.value},
      {"mappings", report.mappings},       {"prefetched_bytes", report.prefetched.value},
      {"criu_ns", report.criu_time.value}, {"criu_waited", report.criu_waited},
      {"elapsed_ns", report.elapsed.value}};
  if (report.unpacked) {
    object["unpacked_into"] = report.unpacked->directory;
    object["unpacked_bytes"] = report.unpacked->pages.value;
    object["unpack_ns"] = report.unpacked->elapsed.value;
  }
  if (!report.why_mode.empty()) object["mode_reason"] = report.why_mode;
  if (report.mode == RestoreMode::kEager) object["fill_ns"] = report.fill_time.value;
  if (report.agent) object["agent"] = report.agent->value;
  PrintJson(object);
}

// A plain CRIU directory is imported beside itself first, or was.
Result<> ImportStock(RestoreOptions& options, bool json) {
  if (!IsStockCriuDirectory(options.directory)) return {};
  ProgressBar bar("import", json);
  UNMOOR_ASSIGN(const ImportedBeside imported,
                ImportBeside({options.directory, {}, UNMOOR_VERSION, [&](Bytes done, Bytes total) {
                                bar.Show(done, total);
                              }}));
  bar.Clear();
  if (imported.fresh) {
    spdlog::warn(
        "{} is a plain CRIU directory, whose pages cannot be mapped where they are; it was "
        "imported into {}, which later restores of it use",
        options.directory, imported.directory);
  } else {
    spdlog::info("{} was imported into {} before", options.directory, imported.directory);
  }
  options.directory = imported.directory;
  return {};
}

// On stderr: stdout may be the program's.
void TellUnpacked(const UnpackedCache& cache, const std::string& directory) {
  const std::string text =
      cache.reused
          ? fmt::format("{} is packed; restored from {}, unpacked before\n", directory,
                        cache.directory)
          : fmt::format(
                "{} is packed; unpacked {} into {} in {}, and restored from there "
                "('unmoor gc' removes it)\n",
                directory, HumanBytes(cache.pages), cache.directory, HumanTime(cache.elapsed));
  std::fputs(text.c_str(), stderr);
}

// It runs already: that it is not recorded is worth a warning.
void Record(const RecordAfterRestore& wanted) {
  if (const auto started = StartRecorder(wanted); !started) {
    spdlog::warn("{}; nothing is recorded", started.error().message());
    if (wanted.remap_afterwards) {
      spdlog::warn("'unmoor remap -t {}' makes it independent", wanted.tasks.front().value);
    }
  }
}

int RunRestore(const RestoreArguments& arguments, const Invocation& invocation) {
  if (arguments.verbose) InitLogging(2);
  auto options = ToOptions(arguments, invocation);
  if (!options) return Report(options.error(), arguments.json);
  RecordAfterRestore record;
  if (arguments.record) {
    record.agent = options->agent;
    record.remap_afterwards = std::exchange(options->agent.remap, false);
    if (!arguments.record_time.empty()) {
      const auto until = ParseDuration(arguments.record_time, 1'000'000'000);
      if (!until) return Report(until.error(), arguments.json);
      record.until = *until;
    }
  }
  if (const auto imported = ImportStock(*options, arguments.json); !imported) {
    return Report(imported.error(), arguments.json);
  }
  ProgressBar bar("restore", arguments.json);
  ProgressBar unpacking("unpack", arguments.json);
  RestoreObserver observer;
  observer.unpacking = [&](Bytes done, Bytes total) { unpacking.Show(done, total); };
  observer.filling = [&](Bytes done, Bytes total) {
    unpacking.Clear();
    bar.Show(done, total);
  };
  auto program = Restore(*options, observer);
  unpacking.Clear();
  bar.Clear();
  if (!program) return Report(program.error(), arguments.json);
  const auto& unpacked = program->report().unpacked;
  if (unpacked && !arguments.json) TellUnpacked(*unpacked, arguments.directory);
  if (arguments.record) {
    record.tasks = program->report().tasks;
    // Of a packed image in its unpacked form, as what is mapped: there the next restore looks for
    // it.
    record.directory =
        RealPath(unpacked ? unpacked->directory : options->directory).value_or(options->directory);
    Record(record);
  }
  if (const std::string& why = program->report().why_mode; !why.empty() && !arguments.json) {
    std::fprintf(stderr, "restored --mode %s: %s\n", ToString(program->report().mode), why.c_str());
  }
  if (arguments.json) PrintReport(program->report());
  std::fflush(stdout);
  // At once, without letting go of the interrupts: one that came late must not look like a failure.
  if (arguments.detached) std::_Exit(kExitSuccess);
  const auto status = program->WaitForRoot();
  if (!status) return Report(status.error(), false);
  if (const auto why = *status ? WhyEnded(program->report().root) : std::nullopt) {
    std::fprintf(stderr, "unmoor: process %d was ended: %s\n", program->report().root.value,
                 why->c_str());
  }
  if (*status) return **status;
  std::fprintf(stderr, "unmoor: interrupted; process %d runs on\n", program->report().root.value);
  return kExitInterrupted;
}

}  // namespace

Action ConfigureRestore(CLI::App& app) {
  const auto arguments = std::make_shared<RestoreArguments>();
  SetUsage(app, "Usage: unmoor restore -D DIR [OPTIONS] [-- CRIU OPTIONS]");
  app.add_option("-D,--images-dir", arguments->directory, "The image directory to restore")
      ->required()
      ->option_text("DIR");
  app.add_flag("-d,--restore-detached", arguments->detached,
               "Return once the program runs, instead of waiting for its end");
  app.add_option("--mode", arguments->mode, "How its memory comes back")
      ->option_text("direct|lazy|eager|auto");
  app.add_option("--remap", arguments->remap, "Whether it is made independent by itself")
      ->option_text("background|off");
  app.add_flag("--record", arguments->record,
               "Note which pages it touches, until 'unmoor record --stop', for the next restore "
               "(a cold one: the page cache forgets the image first)");
  app.add_option("--record-time", arguments->record_time, "Record that long at most")
      ->option_text("TIME");
  app.add_flag("--no-prefetch", arguments->no_prefetch, "Do not read a recorded working set ahead");
  AddAgentOptions(app, arguments->agent);
  app.add_option("--pidfile", arguments->pidfile, "Write the root's process id to FILE")
      ->option_text("FILE");
  app.add_option("--agent-log", arguments->agent_log, "Where the background agent logs")
      ->option_text("FILE");
  app.add_option("--criu", arguments->criu, "The criu to use, 4.2 or later")->option_text("PATH");
  app.add_flag("-v,--verbose", arguments->verbose, "Say more");
  app.add_flag("--json", arguments->json, "One JSON object on stdout, once the program runs");
  app.footer(kFooter);
  return [arguments](const Invocation& invocation) { return RunRestore(*arguments, invocation); };
}

}  // namespace unmoor::cli
