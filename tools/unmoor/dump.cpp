// `unmoor dump`.
#include <charconv>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/log.h"
#include "checkpoint/checkpoint.h"
#include "command.h"
#include "progress.h"
#include "store/flatten.h"

namespace unmoor::cli {
namespace {

struct DumpArguments {
  std::string pid;
  std::string directory;
  std::string timeout;
  std::string criu;
  std::string parent;
  std::string compression;
  bool full = false;
  bool while_mapped = false;
  bool track_mem = false;
  bool pre_dump = false;
  int pre_dump_rounds = 4;
  bool leave_running = false;
  bool dry_run = false;
  bool verbose = false;
  std::string flatten_after = "32";
  bool json = false;
};

constexpr char kFooter[] =
    "\nThe program is frozen while its pages are read (with --pre-dump: while what changed last "
    "is);\n"
    "then it is ended, or runs on with -R, while the rest is written. If anything fails it runs "
    "on\n"
    "as if nothing had happened, and DIR stays as it was. A DIR that holds a checkpoint is "
    "replaced\n"
    "only once the new one is complete.\n"
    "\nExamples:\n"
    "  unmoor dump -t 4711 -D /var/tmp/image\n"
    "  unmoor dump -t $(pidof redis-server) -D /var/tmp/image -R -- --tcp-established\n"
    "  unmoor dump -t 4711 -D /var/tmp/image -- --shell-job\n"
    "  unmoor dump -t 4711 -D /var/tmp/second --prev-images-dir /var/tmp/image\n"
    "\nA restored program's dump writes only what differs from the image it came from, as long as "
    "that\n"
    "is still there; unchanged layers are linked. Every directory is complete by itself.\n"
    "\nExit codes: 0 dumped, 1 the machine failed, 2 wrong use (no such process, bad directory "
    "…).\n";

int PrintDryRun(const CheckpointOptions& options, bool json) {
  const auto tasks = PlanDump(options);
  if (!tasks) return Report(tasks.error(), json);
  nlohmann::json list = nlohmann::json::array();
  for (const DryRunTask& task : *tasks) {
    nlohmann::json vmas = nlohmann::json::array();
    if (!json) std::printf("process %d (%s)\n", task.pid.value, task.name.c_str());
    for (const PlannedVma& item : task.plan) {
      if (json) {
        vmas.push_back({{"begin", item.vma.range.begin.value},
                        {"end", item.vma.range.end.value},
                        {"name", item.vma.name},
                        {"mapped", item.mapped},
                        {"reason", item.why},
                        {"anonymous_bytes", item.vma.anonymous.value}});
      } else {
        const std::string line =
            fmt::format("  {}  {:>10}  {}{}\n", item.vma.range, HumanBytes(item.vma.anonymous),
                        item.mapped ? "layer" : fmt::format("criu ({})", item.why),
                        item.vma.name.empty() ? "" : "  " + item.vma.name);
        Print(line);
      }
    }
    list.push_back({{"pid", task.pid.value}, {"name", task.name}, {"vmas", std::move(vmas)}});
  }
  if (json) PrintJson({{"tasks", std::move(list)}});
  return kExitSuccess;
}

void PrintReport(const CheckpointReport& report, bool flattened, bool json) {
  const ManifestTotals totals = report.manifest.Totals();
  if (json) {
    PrintJson(
        {{"directory", report.directory},
         {"checkpoint_id", report.manifest.checkpoint_id},
         {"tasks", totals.tasks},
         {"vmas", totals.vmas},
         {"mapped_bytes", totals.mapped.value},
         {"layer_bytes", totals.layer_data.value},
         {"written_bytes", report.written.value},
         {"parent", report.parent ? nlohmann::json(*report.parent) : nlohmann::json()},
         {"criu_bytes", totals.criu_data.value},
         {"packed_bytes", report.packed ? nlohmann::json(report.packed->value) : nlohmann::json()},
         {"allocated_bytes", report.allocated.value},
         {"read_bytes", report.read.value},
         {"pre_dump_rounds", report.rounds},
         {"remapped_first", report.remapped_first},
         {"flattened", flattened},
         {"still_mapped", report.still_mapped},
         {"frozen_ns", report.frozen.value},
         {"elapsed_ns", report.elapsed.value}});
    return;
  }
  const std::string layers =
      report.parent ? fmt::format("{} new in layers, {} shared with {}", HumanBytes(report.written),
                                  HumanBytes(totals.layer_data - report.written), *report.parent)
                    : fmt::format("{} in layers", HumanBytes(totals.layer_data));
  const std::string packed =
      report.packed ? fmt::format(" (packed to {})", HumanBytes(*report.packed)) : "";
  const std::string frozen =
      report.frozen.value > 0 ? fmt::format(", frozen for {}", HumanTime(report.frozen)) : "";
  const std::string line = fmt::format(
      "dumped {} process{} to {}: {}{}, {} with criu, {} on disk, in {}{}\n", totals.tasks,
      totals.tasks == 1 ? "" : "es", report.directory, layers, packed, HumanBytes(totals.criu_data),
      HumanBytes(report.allocated), HumanTime(report.elapsed), frozen);
  Print(line);
  if (flattened) Print(fmt::format("flattened {}: the chain had become long\n", report.directory));
}

// More layers than this; nothing: never.
Result<std::optional<size_t>> ParseFlattenAfter(const std::string& text) {
  if (text == "never") return std::optional<size_t>();
  size_t layers = 0;
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, layers);
  if (parsed.ec != std::errc() || parsed.ptr != end || layers == 0) {
    return UserError("--flatten-after is a number of layers, or 'never', not '{}'", text);
  }
  return std::optional<size_t>(layers);
}

// The checkpoint is safe by now, and the program ended or running: failing costs a warning.
bool FlattenIfLong(const std::string& directory, size_t most_layers, bool json) {
  const auto chain = MeasureChain(directory);
  if (!chain || !IsWorthFlattening(*chain, most_layers)) return false;
  ProgressBar bar("flatten", json);
  const auto flat =
      Flatten({directory, {}, [&](Bytes done, Bytes total) { bar.Show(done, total); }});
  bar.Clear();
  if (!flat) spdlog::warn("{}; {} stays a chain", flat.error().message(), directory);
  return flat.has_value();
}

int RunDump(const DumpArguments& arguments, const Invocation& invocation) {
  CheckpointOptions options;
  const auto pid = ParsePid(arguments.pid);
  if (!pid) return Report(pid.error(), arguments.json);
  options.pid = *pid;
  options.directory = arguments.directory;
  options.leave_running = arguments.leave_running;
  options.verbose = arguments.verbose;
  options.tool_version = UNMOOR_VERSION;
  options.criu_arguments = invocation.criu_arguments;
  if (!arguments.criu.empty()) options.criu = arguments.criu;
  if (!arguments.parent.empty()) options.parent = arguments.parent;
  options.full = arguments.full;
  if (!arguments.compression.empty()) {
    const auto compression = ParseCompression(arguments.compression);
    if (!compression) return Report(compression.error(), arguments.json);
    options.compression = *compression;
  }
  options.while_mapped = arguments.while_mapped;
  options.track_mem = arguments.track_mem;
  if (arguments.pre_dump) options.pre_dump_rounds = arguments.pre_dump_rounds;
  if (!arguments.timeout.empty()) {
    const auto timeout = ParseDuration(arguments.timeout, 1'000'000'000);
    if (!timeout) return Report(timeout.error(), arguments.json);
    options.remap_timeout = *timeout;
  }
  const auto flatten_after = ParseFlattenAfter(arguments.flatten_after);
  if (!flatten_after) return Report(flatten_after.error(), arguments.json);
  if (arguments.verbose) InitLogging(2);
  if (arguments.dry_run) return PrintDryRun(options, arguments.json);
  if (options.directory.empty()) {
    return Report(Error(ErrorKind::kUser, 0, "-D DIR is missing: where to write the image"),
                  arguments.json);
  }

  ProgressBar remapping("remap", arguments.json);
  ProgressBar dumping("dump", arguments.json);
  CheckpointObserver observer;
  observer.remapping = [&](Pid, const RemapReport& report) {
    remapping.Show(report.done + report.dropped, report.total, DescribeProgress(report));
  };
  ProgressBar writing("pre-dump", arguments.json);
  observer.writing_ahead = [&](Bytes done, Bytes expected) {
    remapping.Clear();
    writing.Show(done, expected);
  };
  observer.dumping = [&](Bytes done, Bytes expected) {
    remapping.Clear();
    writing.Clear();
    dumping.Show(done, expected);
  };
  ProgressBar packing("pack", arguments.json);
  observer.packing = [&](Bytes done, Bytes total) {
    dumping.Clear();
    packing.Show(done, total);
  };
  const auto report = Dump(options, observer);
  remapping.Clear();
  writing.Clear();
  dumping.Clear();
  packing.Clear();
  if (!report) return Report(report.error(), arguments.json);
  const bool flattened =
      *flatten_after && FlattenIfLong(report->directory, **flatten_after, arguments.json);
  PrintReport(*report, flattened, arguments.json);
  return kExitSuccess;
}

}  // namespace

Action ConfigureDump(CLI::App& app) {
  const auto arguments = std::make_shared<DumpArguments>();
  SetUsage(app, "Usage: unmoor dump -t PID -D DIR [OPTIONS] [-- CRIU OPTIONS]");
  app.add_option("-t,--tree", arguments->pid, "The process to dump, with all its children")
      ->required()
      ->option_text("PID");
  app.add_option("-D,--images-dir", arguments->directory, "Where the image directory is to be")
      ->option_text("DIR");
  app.add_flag("-R,--leave-running", arguments->leave_running, "The program runs on afterwards");
  auto* const parent =
      app.add_option("--prev-images-dir", arguments->parent,
                     "Write only what differs from that checkpoint (default: the image the program "
                     "came from)")
          ->option_text("DIR");
  app.add_option("--flatten-after", arguments->flatten_after,
                 "Merge DIR's layers into one when they are more than N (default 32), or more of "
                 "them is hidden than used")
      ->option_text("N|never");
  auto* const full = app.add_flag("--full", arguments->full, "Write everything")->excludes(parent);
  app.add_option("--compress", arguments->compression,
                 "Pack the new layer afterwards, to keep or send it")
      ->option_text("lz4|zstd[:LEVEL]");
  app.add_flag("--while-mapped", arguments->while_mapped,
               "Dump a program that still maps its image as it is, where that is possible")
      ->excludes(full);
  app.add_flag("--track-mem", arguments->track_mem,
               "As --while-mapped, and compare a program that is independent of its image with "
               "the parent while it runs, so that only what differs is read while it is frozen")
      ->excludes(full);
  auto* const pre_dump = app.add_flag(
      "--pre-dump", arguments->pre_dump,
      "Write the memory while the program runs, and again what it changed meanwhile; frozen it is "
      "for the rest only");
  app.add_option("--pre-dump-rounds", arguments->pre_dump_rounds,
                 "At most so many rounds of that (default 4)")
      ->option_text("N")
      ->check(CLI::Range(1, 64))
      ->needs(pre_dump);
  app.add_option("--timeout", arguments->timeout,
                 "How long to wait for a pending remap (default: as long as it takes)")
      ->option_text("SECONDS");
  app.add_option("--criu", arguments->criu, "The criu to use, 4.2 or later")->option_text("PATH");
  app.add_flag("-n,--dry-run", arguments->dry_run,
               "Only say where each part of the memory would go");
  app.add_flag("-v,--verbose", arguments->verbose, "Say more; keep criu's log in DIR");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(kFooter);
  return [arguments](const Invocation& invocation) { return RunDump(*arguments, invocation); };
}

}  // namespace unmoor::cli
