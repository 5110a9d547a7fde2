// `unmoor reorder`.
#include "store/reorder.h"

#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "progress.h"

namespace unmoor::cli {
namespace {

struct ReorderArguments {
  std::string directory;
  bool dry_run = false;
  bool json = false;
};

nlohmann::json CountOrNull(const std::optional<size_t>& count) {
  return count ? nlohmann::json(*count) : nlohmann::json();
}

std::string Pieces(const std::optional<size_t>& count) {
  if (!count) return "pieces that the file system does not tell";
  return fmt::format("{} piece{}", *count, *count == 1 ? "" : "s");
}

std::string Text(const ReorderReport& report, bool dry_run) {
  const std::string set =
      fmt::format("{}: a working set of {}", report.directory, HumanBytes(report.working_set));
  const std::string before = Pieces(report.extents_before);
  if (dry_run) {
    return fmt::format("{} in {} on the disk; {} would be written\n", set, before,
                       HumanBytes(report.written));
  }
  if (report.written_layers == 0) {
    return fmt::format("{} in {} on the disk, and no better order was to be had; nothing changed\n",
                       set, before);
  }
  return fmt::format("{}, in {} on the disk before, in {} now; {} written\n", set, before,
                     Pieces(report.extents_after), HumanBytes(report.written));
}

int RunReorder(const ReorderArguments& arguments) {
  ProgressBar bar("reorder", arguments.json);
  const auto report = Reorder({arguments.directory, arguments.dry_run,
                               [&](Bytes done, Bytes total) { bar.Show(done, total); }});
  bar.Clear();
  if (!report) return Report(report.error(), arguments.json);
  if (!arguments.json) {
    Print(Text(*report, arguments.dry_run));
    return kExitSuccess;
  }
  PrintJson({{"directory", report->directory},
             {"dry_run", arguments.dry_run},
             {"working_set_bytes", report->working_set.value},
             {"placed_bytes", report->placed.value},
             {"layers", report->layers},
             {"written_layers", report->written_layers},
             {"written_bytes", report->written.value},
             {"extents_before", CountOrNull(report->extents_before)},
             {"extents_after", CountOrNull(report->extents_after)}});
  return kExitSuccess;
}

}  // namespace

Action ConfigureReorder(CLI::App& app) {
  const auto arguments = std::make_shared<ReorderArguments>();
  SetUsage(app, "Usage: unmoor reorder DIR [-n] [--json]");
  app.add_option("dir,-D,--images-dir", arguments->directory, "The image directory")
      ->required()
      ->option_text("DIR");
  app.add_flag("-n,--dry-run", arguments->dry_run, "Write nothing; say what would be done");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(
      "\nWrites the layers anew that hold pages of the recorded working set ('unmoor record'), so "
      "that\n"
      "these lie next to one another on the disk, in the order in which a restore reads them: a "
      "cold\n"
      "restore then reads from one place. Nothing but the place on the disk changes. The new file "
      "is\n"
      "written beside the old one, each block held against its hash, then renamed over it; "
      "programs\n"
      "that map the old file and images that share it keep it (and its disk space).\n");
  return [arguments](const Invocation&) { return RunReorder(*arguments); };
}

}  // namespace unmoor::cli
