// `unmoor pack`, `unmoor unpack`.
#include "image/pack.h"

#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "progress.h"

namespace unmoor::cli {
namespace {

struct PackArguments {
  std::string directory;
  std::string out;
  std::string compression = "lz4";
  bool json = false;

  [[nodiscard]] std::optional<std::string> target() const {
    return out.empty() ? std::nullopt : std::optional(out);
  }
};

double Ratio(const PackReport& report) {
  return report.packed.value == 0
             ? 1
             : static_cast<double>(report.pages.value) / static_cast<double>(report.packed.value);
}

// Of pages, while packing or unpacking; without the flush to disk behind it.
Bytes Rate(const PackReport& report) {
  const double seconds = static_cast<double>(report.working.value) / 1e9;
  return Bytes(
      static_cast<uint64_t>(seconds > 0 ? static_cast<double>(report.pages.value) / seconds : 0));
}

int PrintReport(const PackReport& report, const char* verb, bool json) {
  if (json) {
    PrintJson({{"directory", report.directory},
               {"layers", report.layers},
               {"pages_bytes", report.pages.value},
               {"packed_bytes", report.packed.value},
               {"ratio", Ratio(report)},
               {"working_ns", report.working.value},
               {"elapsed_ns", report.elapsed.value}});
    return kExitSuccess;
  }
  Print(
      fmt::format("{} {}: {} layer{}, {} of pages, {} packed (1 : {:.2f}), in {} ({}/s, the rest "
                  "is the disk)\n",
                  verb, report.directory, report.layers, report.layers == 1 ? "" : "s",
                  HumanBytes(report.pages), HumanBytes(report.packed), Ratio(report),
                  HumanTime(report.elapsed), HumanBytes(Rate(report))));
  return kExitSuccess;
}

int RunPack(const PackArguments& arguments) {
  const auto compression = ParseCompression(arguments.compression);
  if (!compression) return Report(compression.error(), arguments.json);
  ProgressBar bar("pack", arguments.json);
  const auto report = PackDirectory(arguments.directory, arguments.target(), *compression,
                                    [&](Bytes done, Bytes total) { bar.Show(done, total); });
  bar.Clear();
  if (!report) return Report(report.error(), arguments.json);
  return PrintReport(*report, "packed", arguments.json);
}

int RunUnpack(const PackArguments& arguments) {
  ProgressBar bar("unpack", arguments.json);
  const auto report = UnpackDirectory(arguments.directory, arguments.target(),
                                      [&](Bytes done, Bytes total) { bar.Show(done, total); });
  bar.Clear();
  if (!report) return Report(report.error(), arguments.json);
  return PrintReport(*report, "unpacked", arguments.json);
}

void AddOptions(CLI::App& app, PackArguments& arguments) {
  app.add_option("dir,-D,--images-dir", arguments.directory, "The image directory")
      ->required()
      ->option_text("DIR");
  app.add_option("out", arguments.out, "Where to instead of in place; an image there is replaced")
      ->option_text("OUT");
  app.add_flag("--json", arguments.json, "One JSON object on stdout");
}

}  // namespace

Action ConfigurePack(CLI::App& app) {
  const auto arguments = std::make_shared<PackArguments>();
  SetUsage(app, "Usage: unmoor pack DIR [OUT] [--compress lz4|zstd[:LEVEL]] [--json]");
  AddOptions(app, *arguments);
  app.add_option("--compress", arguments->compression,
                 "How: lz4 (default), lz4:1 to lz4:12, zstd (zstd:3), zstd:1 to zstd:19")
      ->option_text("lz4|zstd[:LEVEL]");
  app.footer(
      "\nThe page images become compressed files, in 2 MiB frames, on all cores; each block is "
      "held\n"
      "against its hash before. DIR (or OUT) is the plain or the packed image, complete, at any\n"
      "moment. 'unmoor restore' unpacks beside DIR, but for --mode lazy and eager, which read it "
      "as\n"
      "it is; 'unmoor unpack' makes of it what it was.\n");
  return [arguments](const Invocation&) { return RunPack(*arguments); };
}

Action ConfigureUnpack(CLI::App& app) {
  const auto arguments = std::make_shared<PackArguments>();
  SetUsage(app, "Usage: unmoor unpack DIR [OUT] [--json]");
  AddOptions(app, *arguments);
  app.footer(
      "\nThe page images as they were, holes kept, each block held against its hash on the way. "
      "DIR\n"
      "(or OUT) is the packed or the plain image, complete, at any moment.\n");
  return [arguments](const Invocation&) { return RunUnpack(*arguments); };
}

}  // namespace unmoor::cli
