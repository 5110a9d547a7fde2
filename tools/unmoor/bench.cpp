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
#include <optional>
#include <random>
#include <vector>

#include "base/log.h"
#include "command.h"
#include "criu/runner.h"
#include "image/manifest.h"
#include "image/working_set.h"
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
  std::string criu;
  bool stock = false;
  bool cold = false;
  bool yes = false;
  bool json = false;
};

constexpr char kFooter[] =
    "\nEach mode restores DIR once a round, in an order shuffled anew; the program runs until it "
    "is\n"
    "independent of the image, then it is killed. Its process ids must be free: end it before, or "
    "run\n"
    "this below 'unshare --pid --fork --mount-proc'. The page cache is warm from the second round "
    "on;\n"
    "with --cold each mode also restores it from a cold one in each round: the page cache of the "
    "whole\n"
    "machine is dropped before, which needs root and slows down everybody else for a while. A "
    "working\n"
    "set recorded before ('unmoor record') makes 'direct+prefetch' take part. With --stock 'criu "
    "restore'\n"
    "takes part, from a plain CRIU directory exported beside DIR for as long (it needs DIR's "
    "size).\n"
    "\nExamples:\n"
    "  unmoor dump -t 4711 -D /var/tmp/image && unmoor bench -D /var/tmp/image --yes\n"
    "\nExit codes: 0 measured, 1 the machine failed, 2 wrong use.\n";

struct Sample {
  Nanos runs;   // the command has returned
  Nanos ready;  // from the command's start
};

struct Contestant {
  std::string name;
  std::vector<std::string> options;  // of `unmoor restore`
  bool cold = false;
  bool stock = false;  // `criu restore` instead
  std::vector<Sample> samples;
};

// What is restored: the image and, for stock CRIU, its plain form.
struct Subject {
  std::string directory;
  std::vector<Pid> tasks;  // that a restore of it brings back
  std::string plain;       // empty: stock CRIU does not take part
  std::string criu;
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

// Ends the copy that ran for a sample.
Result<Sample> EndSample(const std::vector<Pid>& tasks, const Sample& sample,
                         const Result<>& ready) {
  UNMOOR_TRY(End(tasks));
  UNMOOR_TRY(ready);
  return sample;
}

Result<Sample> MeasureStock(const Subject& subject) {
  const Nanos begin = MonotonicNow();
  UNMOOR_ASSIGN(
      const CommandOutput output,
      RunAndCollect({subject.criu, "restore", "-D", subject.plain, "-d", "-o", "restore.log"}));
  // What it restored maps nothing.
  const Nanos runs = MonotonicNow() - begin;
  Result<> restored;
  if (!output.status.ok()) {
    const auto lines = criu::DecisiveLogLines(subject.plain + "/restore.log", 1);
    restored = MachineError("criu restore failed: {}", lines.empty() ? output.text : lines.front());
  }
  return EndSample(subject.tasks, {runs, runs}, restored);
}

Result<Sample> MeasureOurs(const Subject& subject, const Contestant& contestant) {
  std::vector<std::string> command = {"restore", "-d", "--json", "-D", subject.directory};
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
  return EndSample(tasks, sample, ready);
}

// Clean pages and what is known of files are forgotten, everywhere. Those of images and exports are
// clean: both were fsynced.
Result<> DropCaches() {
  return WriteFile("/proc/sys/vm/drop_caches", "3");
}

// Brings all of a directory into the page cache.
Result<> Warm(const std::string& directory) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(directory));
  std::vector<std::byte> buffer(size_t{1} << 20);
  for (const std::string& name : names) {
    const std::string path = directory + "/" + name;
    UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK));
    UNMOOR_ASSIGN(const struct stat info, StatFd(fd.get(), path));
    if (S_ISDIR(info.st_mode)) UNMOOR_TRY(Warm(path));
    if (!S_ISREG(info.st_mode)) continue;
    const FileRange all{FileOffset(0), FileOffset(static_cast<uint64_t>(info.st_size))};
    UNMOOR_ASSIGN(const std::vector<FileRange> data, DataRanges(fd.get(), all, path));
    for (FileRange range : data) {
      while (!range.empty()) {
        const auto part =
            std::span(buffer).first(std::min<size_t>(buffer.size(), range.size().value));
        UNMOOR_TRY(ReadExactlyAt(fd.get(), part, range.begin, path));
        range.begin = range.begin + Bytes(part.size());
      }
    }
  }
  return {};
}

double Median(std::vector<Sample> samples, Nanos Sample::* member) {
  std::ranges::sort(samples, {}, [&](const Sample& s) { return (s.*member).value; });
  return static_cast<double>((samples[samples.size() / 2].*member).value) / 1e6;
}

std::string Spread(const std::vector<Sample>& samples, Nanos Sample::* member) {
  const auto [least, most] =
      std::ranges::minmax_element(samples, {}, [&](const Sample& s) { return (s.*member).value; });
  return fmt::format("{:9.1f} ({:.1f}-{:.1f})", Median(samples, member),
                     static_cast<double>(((*least).*member).value) / 1e6,
                     static_cast<double>(((*most).*member).value) / 1e6);
}

// How many times as long as `one` stock CRIU took with the same cache or, without it, direct.
double Ratio(const std::vector<Contestant>& contestants, const Contestant& one) {
  const Contestant* base = nullptr;
  for (const Contestant& other : contestants) {
    if (other.cold == one.cold && (base == nullptr || other.stock)) base = &other;
  }
  return Median(base->samples, &Sample::runs) / Median(one.samples, &Sample::runs);
}

std::string Text(const std::vector<Contestant>& contestants) {
  const bool stock = contestants.back().stock;
  std::string text =
      fmt::format("{:<16} {:<5} {:>26} {:>9} {:>28}\n", "mode", "cache", "runs after, ms",
                  stock ? "stock ÷" : "direct ÷", "independent after, ms");
  for (const Contestant& contestant : contestants) {
    text +=
        fmt::format("{:<16} {:<5} {:>26} {:>8.2f} {:>28}\n", contestant.name,
                    contestant.cold ? "cold" : "warm", Spread(contestant.samples, &Sample::runs),
                    Ratio(contestants, contestant), Spread(contestant.samples, &Sample::ready));
  }
  return text;
}

void PrintTable(const std::string& directory, const std::vector<Contestant>& contestants,
                bool json) {
  if (!json) return Print(Text(contestants));
  nlohmann::json list = nlohmann::json::array();
  for (const Contestant& contestant : contestants) {
    nlohmann::json item = {{"mode", contestant.name},
                           {"cache", contestant.cold ? "cold" : "warm"},
                           {"ratio", Ratio(contestants, contestant)}};
    for (const Sample& sample : contestant.samples) {
      item["runs_ns"].push_back(sample.runs.value);
      item["ready_ns"].push_back(sample.ready.value);
    }
    list.push_back(std::move(item));
  }
  PrintJson({{"directory", directory}, {"modes", std::move(list)}});
}

// One restore by each of those that begin with a cold cache, or with a warm one.
Result<> RunOnce(const Subject& subject, std::vector<Contestant*>& order, bool cold) {
  for (Contestant* contestant : order) {
    if (contestant->cold != cold) continue;
    if (cold) UNMOOR_TRY(DropCaches());
    UNMOOR_ASSIGN(const Sample sample,
                  contestant->stock ? MeasureStock(subject) : MeasureOurs(subject, *contestant));
    contestant->samples.push_back(sample);
  }
  return {};
}

Result<> RunRounds(const BenchArguments& arguments, const Subject& subject,
                   std::vector<Contestant>& contestants) {
  UNMOOR_TRY(BecomeSubreaper());
  std::vector<Contestant*> order;
  for (Contestant& contestant : contestants) order.push_back(&contestant);
  std::mt19937 random(static_cast<unsigned>(WallClockNow().value));
  for (unsigned round = 0; round < arguments.rounds; ++round) {
    std::ranges::shuffle(order, random);
    if (arguments.cold) {
      UNMOOR_TRY(RunOnce(subject, order, true));
      UNMOOR_TRY(Warm(subject.directory));
      if (!subject.plain.empty()) UNMOOR_TRY(Warm(subject.plain));
    }
    UNMOOR_TRY(RunOnce(subject, order, false));
  }
  return {};
}

// Those of the same cache together, stock CRIU last.
Result<std::vector<Contestant>> ChooseContestants(const BenchArguments& arguments) {
  UNMOOR_ASSIGN(const auto set, ReadWorkingSet(arguments.directory));
  std::vector<Contestant> contestants;
  for (const bool cold : {false, true}) {
    if (cold && !arguments.cold) continue;
    contestants.push_back({"direct", {"--no-prefetch"}, cold, false, {}});
    if (set) contestants.push_back({"direct+prefetch", {}, cold, false, {}});
    contestants.push_back({"lazy", {"--mode", "lazy"}, cold, false, {}});
    contestants.push_back({"eager", {"--mode", "eager"}, cold, false, {}});
    if (arguments.stock) contestants.push_back({"stock", {}, cold, true, {}});
  }
  return contestants;
}

// Removed with all that is in it.
class TemporaryPlace {
 public:
  explicit TemporaryPlace(std::string path) : path_(std::move(path)) {}
  TemporaryPlace(const TemporaryPlace&) = delete;
  TemporaryPlace& operator=(const TemporaryPlace&) = delete;
  ~TemporaryPlace() { (void)RemoveTree(path_); }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

Result<std::vector<Contestant>> Compete(const BenchArguments& arguments, const Manifest& manifest) {
  Subject subject;
  UNMOOR_ASSIGN(subject.directory, RealPath(arguments.directory));
  for (const ManifestTask& task : manifest.tasks) {
    subject.tasks.push_back(Pid{static_cast<int>(task.vpid)});
  }
  std::optional<TemporaryPlace> place;
  if (arguments.stock) {
    UNMOOR_ASSIGN(
        const criu::CriuBinary criu,
        criu::FindCriu(arguments.criu.empty() ? std::nullopt : std::optional(arguments.criu),
                       criu::VersionCheck::kNow));
    subject.criu = criu.path;
    // On the same disk, so that what is read cold is read from the same.
    const size_t slash = subject.directory.rfind('/');
    UNMOOR_ASSIGN(std::string path,
                  MakeTemporaryDirectory(subject.directory.substr(0, slash), "unmoor-bench-"));
    place.emplace(std::move(path));
    subject.plain = place->path() + "/plain";
    UNMOOR_TRY(RunSelf({"export", "--json", subject.directory, subject.plain}));
  }
  UNMOOR_ASSIGN(std::vector<Contestant> contestants, ChooseContestants(arguments));
  const auto measured = RunRounds(arguments, subject, contestants);
  if (!measured) {
    KillDescendants();
    return Failure(measured.error());
  }
  return contestants;
}

Result<> CheckArguments(const BenchArguments& arguments) {
  if (!arguments.yes) {
    return UserError(
        "the program in {} would run at least {} times for a moment and be killed; what it does "
        "to files, sockets and other programs meanwhile is real. Say --yes if that is all right",
        arguments.directory, arguments.rounds * 3);
  }
  if (arguments.rounds == 0) return UserError("--rounds 0 measures nothing");
  if (arguments.cold && !OpenFile("/proc/sys/vm/drop_caches", O_WRONLY)) {
    return UserError(
        "--cold drops the page cache of the whole machine, which needs root "
        "(/proc/sys/vm/drop_caches cannot be written here)");
  }
  return {};
}

int RunBench(const BenchArguments& arguments) {
  const auto manifest = ReadManifest(arguments.directory);
  if (!manifest) return Report(manifest.error(), arguments.json);
  if (const auto checked = CheckArguments(arguments); !checked)
    return Report(checked.error(), arguments.json);
  const auto contestants = Compete(arguments, *manifest);
  if (!contestants) return Report(contestants.error(), arguments.json);
  PrintTable(arguments.directory, *contestants, arguments.json);
  return kExitSuccess;
}

}  // namespace

Action ConfigureBench(CLI::App& app) {
  const auto arguments = std::make_shared<BenchArguments>();
  SetUsage(
      app,
      "Usage: unmoor bench -D DIR --yes [--rounds N] [--cold] [--stock] [--criu PATH] [--json]");
  app.add_option("-D,--images-dir", arguments->directory, "The image directory to restore")
      ->required()
      ->option_text("DIR");
  app.add_option("--rounds", arguments->rounds, "How often each mode restores it (5)")
      ->option_text("N");
  app.add_flag("--cold", arguments->cold,
               "Also from a cold page cache, which is dropped for the whole machine (root)");
  app.add_flag("--stock", arguments->stock, "Also by 'criu restore', from an exported copy");
  app.add_option("--criu", arguments->criu, "The criu of --stock")->option_text("PATH");
  app.add_flag("--yes", arguments->yes, "The program may run, and be killed");
  app.add_flag("--json", arguments->json, "One JSON object on stdout, with every time");
  app.footer(kFooter);
  return [arguments](const Invocation&) { return RunBench(*arguments); };
}

}  // namespace unmoor::cli
