// `unmoor import`.
#include "store/import.h"

#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "progress.h"

namespace unmoor::cli {
namespace {

struct ImportArguments {
  std::string directory;
  std::string out;
  bool json = false;
};

int RunImport(const ImportArguments& arguments) {
  ProgressBar bar("import", arguments.json);
  const ImportOptions options{arguments.directory, arguments.out, UNMOOR_VERSION,
                              [&](Bytes done, Bytes total) { bar.Show(done, total); }};
  const auto report = Import(options);
  bar.Clear();
  if (!report) return Report(report.error(), arguments.json);
  if (arguments.json) {
    PrintJson({{"directory", report->directory},
               {"tasks", report->tasks},
               {"generations", report->generations},
               {"layer_bytes", report->layer_bytes.value},
               {"criu_bytes", report->criu_bytes.value}});
    return kExitSuccess;
  }
  const std::string chain =
      report->generations > 1 ? fmt::format(" from a chain of {}", report->generations) : "";
  Print(fmt::format("imported {} process{}{} to {}: {} in a layer, {} with criu\n", report->tasks,
                    report->tasks == 1 ? "" : "es", chain, report->directory,
                    HumanBytes(report->layer_bytes), HumanBytes(report->criu_bytes)));
  return kExitSuccess;
}

}  // namespace

Action ConfigureImport(CLI::App& app) {
  const auto arguments = std::make_shared<ImportArguments>();
  SetUsage(app, "Usage: unmoor import CRIUDIR OUT [--json]");
  app.add_option("dir,-D,--images-dir", arguments->directory, "What criu dump wrote")
      ->required()
      ->option_text("CRIUDIR");
  app.add_option("out", arguments->out, "The image directory to make")
      ->required()
      ->option_text("OUT");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(
      "\nOUT can be restored by mapping, verified, and be the parent of dumps. Incremental dumps "
      "of\n"
      "criu (the link 'parent') are resolved: OUT needs none of them.\n");
  return [arguments](const Invocation&) { return RunImport(*arguments); };
}

}  // namespace unmoor::cli
