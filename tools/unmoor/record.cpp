// `unmoor record`, and what `restore --record` leaves behind: noting a program's working set.
#include "record.h"

#include <csignal>
#include <memory>
#include <nlohmann/json.hpp>

#include "agent/agent.h"
#include "agent/known_image.h"
#include "agent/recording.h"
#include "base/log.h"
#include "command.h"
#include "image/layout.h"
#include "image/working_set.h"
#include "os/daemon.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "restore/record.h"

namespace unmoor::cli {
namespace {

constexpr Nanos kStopPatience{30'000'000'000};

struct RecordArguments {
  std::string pid;
  std::string until_time;
  bool stop = false;
  bool json = false;
};

constexpr char kFooter[] =
    "\nNotes which pages of its image a direct-mapped program touches, so that the next restore\n"
    "reads these first. The program must not be remapped meanwhile: restore it with --record,\n"
    "which records from its first instruction on and remaps it afterwards, or with --remap off.\n"
    "It records until --until-time is over, until Ctrl-C or SIGTERM, or until --stop asks it to.\n"
    "\nExamples:\n"
    "  unmoor restore -D /var/tmp/image -d --record    # then let the program answer\n"
    "  unmoor record -t 4711 --stop                    # and keep what it needed for that\n"
    "  unmoor record -t 4711 --until-time 2s\n"
    "\nExit codes: 0 recorded, 1 the machine failed, 2 wrong use.\n";

void PrintReport(const std::string& directory, const RecordReport& report, bool json) {
  if (json) {
    PrintJson({{"directory", directory},
               {"working_set_bytes", report.bytes.value},
               {"ranges", report.ranges},
               {"elapsed_ns", report.elapsed.value},
               {"kept_earlier", report.kept_earlier}});
    return;
  }
  if (report.kept_earlier) {
    Print(fmt::format(
        "{}: nothing was touched; the working set recorded earlier stays ({} in {} ranges)\n",
        directory, HumanBytes(report.bytes), report.ranges));
    return;
  }
  Print(fmt::format("{}: a working set of {} in {} ranges\n", directory, HumanBytes(report.bytes),
                    report.ranges));
}

// Which file it is: each recording writes another.
std::optional<ino_t> WorkingSetFile(const std::string& directory) {
  const auto info = Stat(WorkingSetPath(directory));
  return info ? std::optional(info->st_ino) : std::nullopt;
}

// Asks the recorder to end and waits for what it kept.
int Stop(Pid pid, bool json) {
  const Nanos begin = MonotonicNow();
  const auto recording = FindRecording(pid);
  if (!recording) {
    return Report(Error(ErrorKind::kUser, 0, fmt::format("nobody records process {}", pid.value)),
                  json);
  }
  const auto before = WorkingSetFile(recording->directory);
  const auto is_recorder = [&] {
    const auto process = ReadProcess(recording->recorder);
    return process && !process->ended() && process->name.starts_with("unmoor");
  };
  for (;;) {
    const bool alive = is_recorder();  // before the file: it goes last
    // Again and again: one that has just been started ignores the first.
    if (alive) (void)SendSignal(recording->recorder, SIGTERM);
    const auto now = FindRecording(pid);
    if (!now) break;
    if (!now->problem.empty() || !alive || MonotonicNow() - begin > kStopPatience) {
      ForgetRecording(pid);
      return Report(
          Error(ErrorKind::kMachine, 0,
                now->problem.empty() ? fmt::format("the recorder of process {} {}", pid.value,
                                                   alive ? "does not end" : "was killed")
                                     : now->problem),
          json);
    }
    SleepFor(Nanos(2'000'000));
  }
  const auto set = ReadWorkingSet(recording->directory);
  if (!set) return Report(set.error(), json);
  if (!*set) {
    return Report(
        Error(ErrorKind::kMachine, 0,
              fmt::format("{} has no working set; was it replaced?", recording->directory)),
        json);
  }
  const bool kept = before && WorkingSetFile(recording->directory) == before;
  PrintReport(recording->directory,
              {(*set)->size(), (*set)->ranges.size(), MonotonicNow() - begin, kept}, json);
  return kExitSuccess;
}

Result<RecordOptions> ToOptions(Pid pid, const RecordArguments& arguments) {
  RecordOptions options;
  if (!arguments.until_time.empty()) {
    UNMOOR_ASSIGN(options.until, ParseDuration(arguments.until_time, 1'000'000'000));
  }
  UNMOOR_ASSIGN(const ProcessStatus status, QueryStatus(pid));
  if (status.direct_mapped.value == 0) {
    return UserError(
        "process {} maps no image (any more), so what it touches is not seen; restore it with "
        "--record",
        pid.value);
  }
  const auto image = FindKnownImage(pid);
  if (!image) {
    return UserError("where the image of process {} is, is not known; restore it with --record",
                     pid.value);
  }
  options.directory = image->directory;
  UNMOOR_ASSIGN(options.tasks, ReadTree(pid));
  return options;
}

int RunRecord(const RecordArguments& arguments) {
  const auto pid = ParsePid(arguments.pid);
  if (!pid) return Report(pid.error(), arguments.json);
  if (arguments.stop) return Stop(*pid, arguments.json);
  const auto options = ToOptions(*pid, arguments);
  if (!options) return Report(options.error(), arguments.json);
  if (const auto other = FindRecording(*pid); other && ReadProcess(other->recorder)) {
    return Report(Error(ErrorKind::kUser, 0,
                        fmt::format("process {} is recorded by process {} already", pid->value,
                                    other->recorder.value)),
                  arguments.json);
  }
  auto interrupt = InterruptFd::Create();
  if (!interrupt) return Report(interrupt.error(), arguments.json);
  const auto noted = NoteRecording(*pid, {OwnPid(), options->directory, {}});
  if (!noted) return Report(noted.error(), arguments.json);
  const auto report = RecordWorkingSet(*options, *interrupt);
  ForgetRecording(*pid);
  if (!report) return Report(report.error(), arguments.json);
  PrintReport(options->directory, *report, arguments.json);
  return kExitSuccess;
}

// In the recorder that a restore left behind.
void RecordInBackground(const RecordAfterRestore& wanted) {
  auto interrupt = InterruptFd::Create();
  const auto report =
      interrupt ? RecordWorkingSet({wanted.tasks, wanted.directory, wanted.until}, *interrupt)
                : Result<RecordReport>(Failure(interrupt.error()));
  if (report) {
    ForgetRecording(wanted.tasks.front());
  } else {
    (void)NoteRecording(wanted.tasks.front(),
                        {OwnPid(), wanted.directory, report.error().message()});
  }
  if (!wanted.remap_afterwards) return;
  // The agent that has watched so far does it.
  for (const Pid pid : wanted.tasks) (void)RemapProcess(pid, wanted.agent, {});
}

}  // namespace

Result<> StartRecorder(const RecordAfterRestore& wanted) {
  UNMOOR_ASSIGN(auto daemon, ForkDaemon({}, wanted.agent.log_file, "unmoor-record"));
  if (!daemon) {
    // Until its parent has noted it.
    const Nanos begin = MonotonicNow();
    while (!FindRecording(wanted.tasks.front()) && MonotonicNow() - begin < Nanos(1'000'000'000)) {
      SleepFor(Nanos(100'000));
    }
    RecordInBackground(wanted);
    ExitProcess(0);
  }
  UNMOOR_ASSIGN(const Pid recorder, daemon->Wait());
  return NoteRecording(wanted.tasks.front(), {recorder, wanted.directory, {}});
}

Action ConfigureRecord(CLI::App& app) {
  const auto arguments = std::make_shared<RecordArguments>();
  SetUsage(app, "Usage: unmoor record -t PID [--until-time TIME | --stop] [--json]");
  app.add_option("-t,--tree", arguments->pid, "The process; its children are recorded with it")
      ->required()
      ->option_text("PID");
  app.add_option("--until-time", arguments->until_time, "Record that long")->option_text("TIME");
  app.add_flag("--stop", arguments->stop, "End the recording of it that is under way");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(kFooter);
  return [arguments](const Invocation&) { return RunRecord(*arguments); };
}

}  // namespace unmoor::cli
