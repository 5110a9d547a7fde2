// `unmoor log`, `unmoor rm`, `unmoor gc`: many image directories.
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "store/catalog.h"

namespace unmoor::cli {
namespace {

constexpr size_t kShortId = 8;

struct StoreArguments {
  std::vector<std::string> places;
  bool dry_run = false;
  bool json = false;
};

double DirtyShare(const Generation& generation) {
  if (generation.pages.value == 0) return 0;
  return static_cast<double>(generation.written.value) /
         static_cast<double>(generation.pages.value);
}

nlohmann::json ToJson(const Generation& generation) {
  if (generation.problem) {
    return {{"directory", generation.directory}, {"error", *generation.problem}};
  }
  const Manifest& manifest = generation.manifest;
  nlohmann::json item = {
      {"directory", generation.directory},     {"checkpoint_id", manifest.checkpoint_id},
      {"created", Date(manifest.created)},     {"created_unix_ns", manifest.created.value},
      {"tasks", manifest.tasks.size()},        {"layers", manifest.layers.size()},
      {"pages_bytes", generation.pages.value}, {"freeable_bytes", generation.freeable.value}};
  item["packed"] = generation.packed;
  if (manifest.parent_id) item["parent_id"] = *manifest.parent_id;
  if (generation.parent_directory) item["parent_directory"] = *generation.parent_directory;
  if (generation.written_known()) {
    item["written_bytes"] = generation.written.value;
    item["dirty_share"] = DirtyShare(generation);
  }
  return item;
}

std::string ToText(const Generation& generation) {
  if (generation.problem)
    return fmt::format("{}\n  {}\n", generation.directory, *generation.problem);
  const Manifest& manifest = generation.manifest;
  std::string parent = "-";
  if (manifest.parent_id) {
    parent = manifest.parent_id->substr(0, kShortId);
    if (!generation.parent_directory) parent += " (not here)";
  }
  std::string text =
      fmt::format("{}\n  {}  {}  after {}  ", generation.directory,
                  manifest.checkpoint_id.substr(0, kShortId), Date(manifest.created), parent);
  text += generation.written_known()
              ? fmt::format("{} written of {} ({:.1f} %)", HumanBytes(generation.written),
                            HumanBytes(generation.pages), DirtyShare(generation) * 100)
              : fmt::format("{} of pages", HumanBytes(generation.pages));
  return text + fmt::format("  {} layer{}{}  {} on disk its own\n", manifest.layers.size(),
                            manifest.layers.size() == 1 ? "" : "s",
                            generation.packed ? ", packed" : "", HumanBytes(generation.freeable));
}

int RunLog(const StoreArguments& arguments) {
  const auto generations = ListGenerations(arguments.places);
  if (!generations) return Report(generations.error(), arguments.json);
  if (arguments.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const Generation& generation : *generations) list.push_back(ToJson(generation));
    PrintJson({{"generations", std::move(list)}});
    return kExitSuccess;
  }
  for (const Generation& generation : *generations) Print(ToText(generation));
  if (generations->empty()) Print("no image directories\n");
  return kExitSuccess;
}

int RunRemove(const StoreArguments& arguments) {
  Bytes freed;
  for (const std::string& directory : arguments.places) {
    const auto removed = RemoveImage(directory);
    if (!removed) return Report(removed.error(), arguments.json);
    freed += *removed;
    if (!arguments.json)
      Print(fmt::format("removed {}, {} freed\n", directory, HumanBytes(*removed)));
  }
  if (arguments.json) PrintJson({{"removed", arguments.places}, {"freed_bytes", freed.value}});
  return kExitSuccess;
}

int RunCollect(const StoreArguments& arguments) {
  const auto report = CollectGarbage(arguments.places[0], arguments.dry_run);
  if (!report) return Report(report.error(), arguments.json);
  if (arguments.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const Garbage& item : report->items)
      list.push_back({{"path", item.path}, {"why", item.why}});
    nlohmann::json kept = nlohmann::json::array();
    for (const Kept& item : report->kept) {
      kept.push_back({{"path", item.path}, {"why", item.why}, {"layers", item.layers}});
    }
    PrintJson({{"dry_run", arguments.dry_run},
               {"items", std::move(list)},
               {"kept", std::move(kept)},
               {"freed_bytes", report->bytes.value}});
    return kExitSuccess;
  }
  for (const Kept& item : report->kept) {
    const size_t layers = item.layers.size();
    Print(fmt::format(
        "kept {}: {}{}\n", item.path, item.why,
        layers == 0 ? "" : fmt::format(" of {} layer{}", layers, layers == 1 ? "" : "s")));
  }
  for (const Garbage& item : report->items) {
    Print(fmt::format("{} {}: {}\n", arguments.dry_run ? "would remove" : "removed", item.path,
                      item.why));
  }
  Print(fmt::format(
      "{} {}, {}\n", report->items.size(), arguments.dry_run ? "would be removed" : "removed",
      HumanBytes(report->bytes) + (arguments.dry_run ? " would be freed" : " freed")));
  return kExitSuccess;
}

}  // namespace

Action ConfigureLog(CLI::App& app) {
  const auto arguments = std::make_shared<StoreArguments>();
  SetUsage(app, "Usage: unmoor log DIR|STORE... [--json]");
  app.add_option("places", arguments->places, "Image directories, or directories of them")
      ->required()
      ->option_text("DIR|STORE");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(
      "\nOldest first: id, when, after which, how much was written of how much memory, and what\n"
      "removing this directory alone would free on disk (files shared by hard link free "
      "nothing).\n");
  return [arguments](const Invocation&) { return RunLog(*arguments); };
}

Action ConfigureRemove(CLI::App& app) {
  const auto arguments = std::make_shared<StoreArguments>();
  SetUsage(app, "Usage: unmoor rm DIR... [--json]");
  app.add_option("directories", arguments->places, "Image directories")
      ->required()
      ->option_text("DIR");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(
      "\nNo other image and no program needs a removed one. It is gone by one rename; anything "
      "that\n"
      "is not an image directory, or is in use by a command, is refused.\n");
  return [arguments](const Invocation&) { return RunRemove(*arguments); };
}

Action ConfigureCollect(CLI::App& app) {
  const auto arguments = std::make_shared<StoreArguments>();
  SetUsage(app, "Usage: unmoor gc STORE [-n] [--json]");
  app.add_option("store", arguments->places, "A directory of image directories")
      ->required()
      ->expected(1)
      ->option_text("STORE");
  app.add_flag("-n,--dry-run", arguments->dry_run, "Only say what would be removed");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(
      "\nRemoves what killed commands left (NAME.partial-XXXXXX that nobody holds, unfinished\n"
      "repairs), what restores unpacked of packed images (.NAME.unpacked-BOOT) and layer files "
      "that\n"
      "the manifest beside them does not name; says what it keeps: each image, and what is in "
      "use.\n"
      "Images are never removed: that is 'unmoor rm'.\n");
  return [arguments](const Invocation&) { return RunCollect(*arguments); };
}

}  // namespace unmoor::cli
