// `unmoor flatten`.
#include "store/flatten.h"

#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "progress.h"

namespace unmoor::cli {
namespace {

struct FlattenArguments {
  std::string directory;
  std::string out;
  bool json = false;
};

int RunFlatten(const FlattenArguments& arguments) {
  ProgressBar bar("flatten", arguments.json);
  const FlattenOptions options{arguments.directory, arguments.out,
                               [&](Bytes done, Bytes total) { bar.Show(done, total); }};
  const auto report = Flatten(options);
  bar.Clear();
  if (!report) return Report(report.error(), arguments.json);
  if (arguments.json) {
    PrintJson({{"directory", report->directory},
               {"was_flat", report->was_flat},
               {"layers_before", report->layers_before},
               {"layer_bytes_before", report->layer_bytes_before.value},
               {"written_bytes", report->written.value}});
    return kExitSuccess;
  }
  if (report->was_flat) {
    Print(fmt::format("{} is flat already; nothing was written\n", report->directory));
    return kExitSuccess;
  }
  Print(fmt::format("flattened into {}: {} layer{} with {} became one with {}\n", report->directory,
                    report->layers_before, report->layers_before == 1 ? "" : "s",
                    HumanBytes(report->layer_bytes_before), HumanBytes(report->written)));
  return kExitSuccess;
}

}  // namespace

Action ConfigureFlatten(CLI::App& app) {
  const auto arguments = std::make_shared<FlattenArguments>();
  SetUsage(app, "Usage: unmoor flatten DIR [OUT] [--json]");
  app.add_option("dir,-D,--images-dir", arguments->directory, "The image directory")
      ->required()
      ->option_text("DIR");
  app.add_option("out", arguments->out, "Where the flat one is to be (default: in place of DIR)")
      ->option_text("OUT");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(
      "\nThe same checkpoint with one layer: what deltas hide is left out, and a restore maps all "
      "of\n"
      "it. Written beside and put in place complete; programs that map the old layers and images\n"
      "that share them keep them. Every page is held against its hash on the way.\n");
  return [arguments](const Invocation&) { return RunFlatten(*arguments); };
}

}  // namespace unmoor::cli
