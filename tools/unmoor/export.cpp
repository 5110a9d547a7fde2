// `unmoor export`.
#include "store/export.h"

#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "progress.h"

namespace unmoor::cli {
namespace {

struct ExportArguments {
  std::string directory;
  std::string out;
  bool json = false;
};

int RunExport(const ExportArguments& arguments) {
  ProgressBar bar("export", arguments.json);
  ExportOptions options{arguments.directory, arguments.out,
                        [&](Bytes done, Bytes total) { bar.Show(done, total); }};
  const auto report = Export(options);
  bar.Clear();
  if (!report) return Report(report.error(), arguments.json);
  if (arguments.json) {
    PrintJson({{"directory", report->directory},
               {"tasks", report->tasks},
               {"pages_bytes", report->pages.value}});
    return kExitSuccess;
  }
  const std::string text =
      fmt::format("exported {} process{} to {}: {} of pages; criu restore -D {}\n", report->tasks,
                  report->tasks == 1 ? "" : "es", report->directory, HumanBytes(report->pages),
                  report->directory);
  Print(text);
  return kExitSuccess;
}

}  // namespace

Action ConfigureExport(CLI::App& app) {
  const auto arguments = std::make_shared<ExportArguments>();
  SetUsage(app, "Usage: unmoor export DIR OUT [--json]");
  app.add_option("dir,-D,--images-dir", arguments->directory, "The image directory")
      ->required()
      ->option_text("DIR");
  app.add_option("out", arguments->out, "The CRIU directory to make")
      ->required()
      ->option_text("OUT");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(
      "\nOUT is what a plain 'criu dump' would have left, deltas merged: 'criu restore -D OUT' of\n"
      "the criu that made the image restores it, with the options the program needs. Every page "
      "is\n"
      "held against its hash on the way.\n");
  return [arguments](const Invocation&) { return RunExport(*arguments); };
}

}  // namespace unmoor::cli
