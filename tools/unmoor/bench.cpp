// `unmoor bench`: restores one's own image by each mode in turn and says how long it took.
//
// The program really runs, for moments: what it does to files and other programs meanwhile is real,
// so --yes has to say that this is all right. Each copy is ended by SIGKILL once it is independent.
// The restores are commands of their own, timed from outside, as a user would see them.
#include <fcntl.h>

#include <algorithm>
#include <csignal>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

#include "base/log.h"
#include "command.h"
#include "image/manifest.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/spawn.h"

namespace unmoor::cli {
namespace {

constexpr char kSelf[] = "/proc/self/exe";
constexpr Nanos kEndPatience{30'000'000'000};

struct BenchArguments {
  std::string directory;
  unsigned rounds = 5;
  bool yes = false;
  bool json = false;
};

constexpr char kFooter[] =
    "\nEach mode restores DIR once a round, in an order shuffled anew; the program runs until it "
    "is\n"
    "independent of the image, then it is killed. Its process ids must be free: end it before, or "
    "run\n"
    "this below 'unshare --pid --fork --mount-proc'. The page cache is warm from the second round "
    "on.\n"
    "bench/run of the source tree compares with stock CRIU, cold and warm.\n"
    "\nExamples:\n"
    "  unmoor dump -t 4711 -D /var/tmp/image && unmoor bench -D /var/tmp/image --yes\n"
    "\nExit codes: 0 measured, 1 the machine failed, 2 wrong use.\n";

struct Sample {
  Nanos runs;   // the command has returned
  Nanos ready;  // from the command's start
};

struct Contestant {
  std::string name;
  std::vector<std::string> options;
  std::vector<Sample> samples;
};

// What a command of ours wrote to stdout; an error with its own words when it failed.
Result<std::string> RunSelf(const std::vector<std::string>& arguments) {
  UNMOOR_ASSIGN(const Fd out, OpenFile("/tmp", O_TMPFILE | O_RDWR, 0600));
  UNMOOR_ASSIGN(const Fd null, OpenFile("/dev/null", O_RDWR));
  SpawnOptions options;
  options.argv = {kSelf};
  options.argv.insert(options.argv.end(), arguments.begin(), arguments.end());
  options.stdin_fd = null.get();
  options.stdout_fd = out.get();
  options.stderr_fd = null.get();
  UNMOOR_ASSIGN(ChildProcess child, Spawn(options));
  UNMOOR_ASSIGN(const ExitStatus status, child.Wait());
  UNMOOR_ASSIGN(const struct stat info, StatFd(out.get(), "what a command wrote"));
  std::string text(static_cast<size_t>(info.st_size), '\0');
  UNMOOR_TRY(ReadExactlyAt(out.get(), std::as_writable_bytes(std::span(text)), FileOffset(0),
                           "what a command wrote"));
  if (!status.ok()) {
    const auto json = nlohmann::json::parse(text, nullptr, false);
    return MachineError("unmoor {} failed: {}", arguments.front(),
                        json.is_object() ? json.value("error", text) : text);
  }
  return text;
}

// Ends what was restored, and waits until its ids are free.
Result<> End(const std::vector<Pid>& tasks) {
  const Nanos begin = MonotonicNow();
  KillDescendants();
  for (const Pid pid : tasks) {
    while (ReadProcess(pid)) {
      (void)ReapChild(pid);
      if (MonotonicNow() - begin > kEndPatience)
        return MachineError("process {} does not end", pid.value);
      SleepFor(Nanos(1'000'000));
    }
  }
  return {};
}

Result<Sample> Measure(const std::string& directory, const Contestant& contestant) {
  std::vector<std::string> command = {"restore", "-d", "--json", "-D", directory};
  command.insert(command.end(), contestant.options.begin(), contestant.options.end());
  Sample sample;
  const Nanos begin = MonotonicNow();
  UNMOOR_ASSIGN(const std::string text, RunSelf(command));
  sample.runs = MonotonicNow() - begin;
  const auto report = nlohmann::json::parse(text, nullptr, false);
  if (!report.is_object() || !report.contains("tasks"))
    return MachineError("unmoor restore said {}", text);
  std::vector<Pid> tasks;
  for (const auto& pid : report["tasks"]) tasks.push_back(Pid{pid.get<int>()});
  Result<> ready;
  for (const Pid pid : tasks) {
    // One that has ended meanwhile needs no image.
    if (const auto waited = RunSelf({"wait", "--json", "-t", std::to_string(pid.value)});
        !waited && ReadProcess(pid)) {
      ready = Failure(waited.error());
    }
  }
  sample.ready = MonotonicNow() - begin;
  UNMOOR_TRY(End(tasks));
  UNMOOR_TRY(ready);
  return sample;
}

double Median(std::vector<Sample> samples, Nanos Sample::*member) {
  std::ranges::sort(samples, {}, [&](const Sample& s) { return (s.*member).value; });
  return static_cast<double>((samples[samples.size() / 2].*member).value) / 1e6;
}

std::string Spread(const std::vector<Sample>& samples, Nanos Sample::*member) {
  const auto [least, most] =
      std::ranges::minmax_element(samples, {}, [&](const Sample& s) { return (s.*member).value; });
  return fmt::format("{:9.1f} ({:.1f}-{:.1f})", Median(samples, member),
                     static_cast<double>(((*least).*member).value) / 1e6,
                     static_cast<double>(((*most).*member).value) / 1e6);
}

void PrintTable(const std::string& directory, const std::vector<Contestant>& contestants,
                bool json) {
  nlohmann::json list = nlohmann::json::array();
  std::string text =
      fmt::format("{:<10} {:>26} {:>28}\n", "mode", "runs after, ms", "independent after, ms");
  for (const Contestant& contestant : contestants) {
    text += fmt::format("{:<10} {:>26} {:>28}\n", contestant.name,
                        Spread(contestant.samples, &Sample::runs),
                        Spread(contestant.samples, &Sample::ready));
    nlohmann::json item = {{"mode", contestant.name}};
    for (const Sample& sample : contestant.samples) {
      item["runs_ns"].push_back(sample.runs.value);
      item["ready_ns"].push_back(sample.ready.value);
    }
    list.push_back(std::move(item));
  }
  if (json) {
    PrintJson({{"directory", directory}, {"modes", std::move(list)}});
  } else {
    Print(text);
  }
}

Result<> RunRounds(const BenchArguments& arguments, std::vector<Contestant>& contestants) {
  UNMOOR_TRY(BecomeSubreaper());
  std::vector<Contestant*> order;
  for (Contestant& contestant : contestants) order.push_back(&contestant);
  std::mt19937 random(static_cast<unsigned>(WallClockNow().value));
  for (unsigned round = 0; round < arguments.rounds; ++round) {
    std::ranges::shuffle(order, random);
    for (Contestant* contestant : order) {
      UNMOOR_ASSIGN(const Sample sample, Measure(arguments.directory, *contestant));
      contestant->samples.push_back(sample);
    }
  }
  return {};
}

int RunBench(const BenchArguments& arguments) {
  const auto manifest = ReadManifest(arguments.directory);
  if (!manifest) return Report(manifest.error(), arguments.json);
  if (!arguments.yes) {
    return Report(
        Error(ErrorKind::kUser, 0,
              fmt::format(
                  "the program in {} would run {} times for a moment and be killed; what it does "
                  "to files, "
                  "sockets and other programs meanwhile is real. Say --yes if that is all right",
                  arguments.directory, arguments.rounds * 3)),
        arguments.json);
  }
  if (arguments.rounds == 0)
    return Report(Error(ErrorKind::kUser, 0, "--rounds 0 measures nothing"), arguments.json);
  std::vector<Contestant> contestants = {
      {"direct", {}, {}}, {"lazy", {"--mode", "lazy"}, {}}, {"eager", {"--mode", "eager"}, {}}};
  const auto measured = RunRounds(arguments, contestants);
  if (!measured) {
    KillDescendants();
    return Report(measured.error(), arguments.json);
  }
  PrintTable(arguments.directory, contestants, arguments.json);
  return kExitSuccess;
}

}  // namespace

Action ConfigureBench(CLI::App& app) {
  const auto arguments = std::make_shared<BenchArguments>();
  SetUsage(app, "Usage: unmoor bench -D DIR --yes [--rounds N] [--json]");
  app.add_option("-D,--images-dir", arguments->directory, "The image directory to restore")
      ->required()
      ->option_text("DIR");
  app.add_option("--rounds", arguments->rounds, "How often each mode restores it (5)")
      ->option_text("N");
  app.add_flag("--yes", arguments->yes, "The program may run, and be killed");
  app.add_flag("--json", arguments->json, "One JSON object on stdout, with every time");
  app.footer(kFooter);
  return [arguments](const Invocation&) { return RunBench(*arguments); };
}

}  // namespace unmoor::cli
