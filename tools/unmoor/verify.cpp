// `unmoor verify`.
#include "store/verify.h"

#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "progress.h"

namespace unmoor::cli {
namespace {

constexpr int kExitDamaged = 3;
constexpr size_t kShown = 100;

struct VerifyArguments {
  std::string directory;
  std::string repair_from;
  bool quick = false;
  bool deep = false;
  bool json = false;
};

constexpr char kFooter[] =
    "\nChecks everything that has a checksum: manifest, indexes, every 64 KiB of pages; and that\n"
    "CRIU's own files, which have none, can be read and are of the right length. All damage is\n"
    "told, with the task and addresses it concerns. --repair-from writes a damaged layer anew "
    "from\n"
    "what DIR and DIR2 still have of it; the file is replaced only when all of it is right.\n"
    "\nExamples:\n"
    "  unmoor verify /var/tmp/image\n"
    "  unmoor verify /var/tmp/image --repair-from /mnt/backup/image\n"
    "\nExit codes: 0 sound, or all of it repaired; 3 damaged; 1 the machine failed, 2 wrong use, "
    "no\n"
    "image.\n";

nlohmann::json ToJson(const std::vector<Damage>& damages) {
  nlohmann::json list = nlohmann::json::array();
  for (const Damage& damage : damages) {
    nlohmann::json item = {{"file", damage.file}, {"what", damage.what}};
    if (damage.bytes) {
      item["offset"] = damage.bytes->begin.value;
      item["size_bytes"] = damage.bytes->size().value;
    }
    nlohmann::json places = nlohmann::json::array();
    for (const DamagePlace& place : damage.places) {
      places.push_back({{"vpid", place.task_vpid},
                        {"task", place.task},
                        {"vma", fmt::format("{}", place.vma)},
                        {"vma_name", place.vma_name},
                        {"begin", fmt::format("{:x}", place.addresses.begin.value)},
                        {"end", fmt::format("{:x}", place.addresses.end.value)}});
    }
    item["places"] = std::move(places);
    list.push_back(std::move(item));
  }
  return list;
}

std::string Text(const std::vector<Damage>& damages, const char* label) {
  std::string text;
  size_t lines = 0;
  for (const Damage& damage : damages) {
    if (++lines > kShown) {
      return text + fmt::format("… and {} more (--json lists all)\n", damages.size() - kShown);
    }
    text += fmt::format("{}{}\n", label, damage.what);
    for (size_t i = 0; i < damage.places.size(); ++i) {
      if (i == kShown) {
        text += fmt::format("    … and {} more VMAs\n", damage.places.size() - kShown);
        break;
      }
      const DamagePlace& place = damage.places[i];
      text += fmt::format("    task {} ({}): {} of VMA {}{}{}\n", place.task_vpid,
                          place.task.empty() ? "?" : place.task, place.addresses, place.vma,
                          place.vma_name.empty() ? "" : " ", place.vma_name);
    }
  }
  return text;
}

void PrintReport(const VerifyDirectoryReport& report, const VerifyArguments& arguments, int code) {
  if (arguments.json) {
    PrintJson({{"directory", report.directory},
               {"sound", report.sound()},
               {"quick", arguments.quick},
               {"damages", ToJson(report.damages)},
               {"repaired", ToJson(report.repaired)},
               {"layers", report.layers},
               {"checked_bytes", report.checked.value},
               {"elapsed_ns", report.elapsed.value},
               {"exit_code", code}});
    return;
  }
  std::string text = Text(report.repaired, "repaired: ") + Text(report.damages, "damaged: ");
  const double seconds = static_cast<double>(report.elapsed.value) / 1e9;
  const auto rate =
      static_cast<uint64_t>(seconds > 0 ? static_cast<double>(report.checked.value) / seconds : 0);
  text += fmt::format("{}: {}; {} layer{}, {} of pages checked in {}{}\n", report.directory,
                      report.sound() ? "sound" : "DAMAGED", report.layers,
                      report.layers == 1 ? "" : "s", HumanBytes(report.checked),
                      HumanTime(report.elapsed),
                      report.checked.value > 0 ? ", " + HumanBytes(Bytes(rate)) + "/s" : "");
  Print(text);
}

int RunVerify(const VerifyArguments& arguments) {
  ProgressBar bar("verify", arguments.json);
  VerifyDirectoryOptions options;
  options.directory = arguments.directory;
  options.quick = arguments.quick;
  options.deep = arguments.deep;
  if (!arguments.repair_from.empty()) options.repair_from = arguments.repair_from;
  options.progress = [&](Bytes done, Bytes total) { bar.Show(done, total); };
  const auto report = VerifyDirectory(options);
  bar.Clear();
  if (!report) return Report(report.error(), arguments.json);
  const int code = report->sound() ? kExitSuccess : kExitDamaged;
  PrintReport(*report, arguments, code);
  return code;
}

}  // namespace

Action ConfigureVerify(CLI::App& app) {
  const auto arguments = std::make_shared<VerifyArguments>();
  SetUsage(app, "Usage: unmoor verify DIR [--quick | --deep | --repair-from DIR2] [--json]");
  app.add_option("dir,-D,--images-dir", arguments->directory, "The image directory")
      ->required()
      ->option_text("DIR");
  const auto quick =
      app.add_flag("--quick", arguments->quick, "Manifest and indexes only; pages are not read");
  app.add_flag("--deep", arguments->deep,
               "Packed layers: decompress every frame and hold its pages against their hashes")
      ->excludes(quick);
  app.add_option("--repair-from", arguments->repair_from,
                 "Mend damaged layers from another directory that has them")
      ->option_text("DIR2")
      ->excludes(quick);
  app.add_flag("--json", arguments->json, "One JSON object on stdout, with all damage");
  app.footer(kFooter);
  return [arguments](const Invocation&) { return RunVerify(*arguments); };
}

}  // namespace unmoor::cli
