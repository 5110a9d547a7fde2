// `unmoor show`: what an image directory holds, from its manifest and the layers' indexes.
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "image/layer_reader.h"
#include "image/layout.h"
#include "image/manifest.h"
#include "image/packed_layer.h"
#include "os/file.h"

namespace unmoor::cli {
namespace {

struct ShowArguments {
  std::string directory;
  bool vmas = false;
  bool json = false;
};

constexpr char kFooter[] =
    "\nReads the manifest and the layers' indexes and checks them; the pages themselves are not "
    "read.\n"
    "\nExamples:\n"
    "  unmoor show -D /var/tmp/image\n"
    "  unmoor show -D /var/tmp/image --vmas\n"
    "  unmoor show -D /var/tmp/image --json | jq '.tasks[].vmas[] | select(.kind==\"mapped\")'\n"
    "\nExit codes: 0 a sound image directory, 1 the machine failed, 2 no image, damaged or of "
    "another\n"
    "format version.\n";

const char* Word(VmaKind kind) {
  switch (kind) {
    case VmaKind::kMapped:
      return "mapped";
    case VmaKind::kCriu:
      return "criu";
    case VmaKind::kNone:
      return "none";
  }
  return "none";
}

std::string Protection(int prot) {
  // PROT_READ, PROT_WRITE, PROT_EXEC are 1, 2, 4.
  return {(prot & 1) != 0 ? 'r' : '-', (prot & 2) != 0 ? 'w' : '-', (prot & 4) != 0 ? 'x' : '-'};
}

// Blocks on disk now; the manifest's figure may be older than write-back.
Bytes Allocated(const std::string& path) {
  const auto info = Stat(path);
  return info ? Bytes(static_cast<uint64_t>(info->st_blocks) * 512) : Bytes(0);
}

struct ShownLayer {
  ManifestLayer entry;
  Bytes allocated;
  size_t extents = 0;
  size_t segments = 0;
  std::string packed;  // how; empty: it is not
};

nlohmann::json ToJson(const ManifestTask& task) {
  nlohmann::json vmas = nlohmann::json::array();
  for (const ManifestVma& vma : task.vmas) {
    nlohmann::json item = {{"begin", fmt::format("{:x}", vma.range.begin.value)},
                           {"end", fmt::format("{:x}", vma.range.end.value)},
                           {"protection", Protection(vma.prot)},
                           {"kind", Word(vma.kind)},
                           {"size_bytes", vma.range.size().value},
                           {"data_bytes", vma.data.value},
                           {"name", vma.name},
                           {"flags", vma.flags}};
    if (vma.kind == VmaKind::kMapped) {
      item["layer"] = vma.layer;
      item["offset"] = vma.offset.value;
    }
    for (const ManifestDelta& delta : vma.deltas) {
      item["deltas"].push_back({{"layer", delta.layer}, {"offset", delta.offset.value}});
    }
    vmas.push_back(std::move(item));
  }
  return {{"vpid", task.vpid},
          {"ppid", task.ppid},
          {"name", task.comm},
          {"state", task.state},
          {"vmas", std::move(vmas)}};
}

void ShowJson(const std::string& directory, const Manifest& manifest,
              const std::vector<ShownLayer>& layers) {
  const ManifestTotals totals = manifest.Totals();
  nlohmann::json tasks = nlohmann::json::array();
  for (const ManifestTask& task : manifest.tasks) tasks.push_back(ToJson(task));
  nlohmann::json list = nlohmann::json::array();
  for (const ShownLayer& layer : layers) {
    list.push_back({{"id", layer.entry.id},
                    {"data_bytes", layer.entry.data.value},
                    {"allocated_bytes", layer.allocated.value},
                    {"file_size_bytes", layer.entry.pages_size.value},
                    {"extents", layer.extents},
                    {"segments", layer.segments}});
    if (!layer.packed.empty()) list.back()["packed"] = layer.packed;
  }
  nlohmann::json object = {{"directory", directory},
                           {"format_version", kFormatVersion},
                           {"checkpoint_id", manifest.checkpoint_id},
                           {"created", Date(manifest.created)},
                           {"unmoor_version", manifest.tool_version},
                           {"criu_version", manifest.criu_version},
                           {"kernel", manifest.kernel_release},
                           {"page_size", manifest.page_size},
                           {"root_vpid", manifest.root_vpid},
                           {"totals",
                            {{"tasks", totals.tasks},
                             {"vmas", totals.vmas},
                             {"mapped_bytes", totals.mapped.value},
                             {"layer_bytes", totals.layer_data.value},
                             {"criu_bytes", totals.criu_data.value}}},
                           {"tasks", std::move(tasks)},
                           {"layers", std::move(list)}};
  object["kind"] = manifest.kind == ImageKind::kMemory ? "memory" : "process";
  if (manifest.parent_id) object["parent_id"] = *manifest.parent_id;
  if (manifest.user_data) object["user_data_bytes"] = manifest.user_data->size.value;
  PrintJson(object);
}

// Ranges of memory instead of tasks.
std::string MemoryText(const std::string& directory, const Manifest& manifest) {
  const ManifestTotals totals = manifest.Totals();
  std::string text =
      fmt::format("{}\n  image of memory {}, {}\n  made by {} with libunmoor {}, kernel {}\n",
                  directory, manifest.checkpoint_id, Date(manifest.created), manifest.tasks[0].comm,
                  manifest.tool_version, manifest.kernel_release);
  if (manifest.parent_id) text += fmt::format("  made after {}\n", *manifest.parent_id);
  text += fmt::format("  {} in layers, {} of addresses, {} of user data\n",
                      HumanBytes(totals.layer_data), HumanBytes(totals.mapped),
                      HumanBytes(manifest.user_data ? manifest.user_data->size : Bytes(0)));
  text += "\nranges\n";
  for (const ManifestVma& vma : manifest.tasks[0].vmas) {
    text += fmt::format("  {} {} {:>10} of {:>10}", vma.range, Protection(vma.prot),
                        HumanBytes(vma.data), HumanBytes(vma.range.size()));
    if (!vma.deltas.empty()) text += fmt::format("  {} deltas", vma.deltas.size());
    text += "\n";
  }
  if (manifest.tasks[0].vmas.empty()) text += "  none\n";
  return text;
}

// "  layer 0 + 2 + 3": its own and the deltas over it, lowest first, as the list of layers has
// them.
std::string LayersOf(const ManifestVma& vma) {
  if (vma.kind != VmaKind::kMapped) return "";
  std::string text = fmt::format("  layer {}", vma.layer);
  for (const ManifestDelta& delta : vma.deltas) text += fmt::format(" + {}", delta.layer);
  return text;
}

std::string ProcessText(const std::string& directory, const Manifest& manifest, bool with_vmas) {
  const ManifestTotals totals = manifest.Totals();
  std::string text =
      fmt::format("{}\n  checkpoint {}, {}\n  unmoor {}, criu {}, kernel {}\n", directory,
                  manifest.checkpoint_id, Date(manifest.created), manifest.tool_version,
                  manifest.criu_version, manifest.kernel_release);
  if (manifest.parent_id) text += fmt::format("  made after {}\n", *manifest.parent_id);
  text += fmt::format("  {} in layers, {} with criu, {} of addresses mapped, {} VMAs\n",
                      HumanBytes(totals.layer_data), HumanBytes(totals.criu_data),
                      HumanBytes(totals.mapped), totals.vmas);
  text += "\ntasks\n";
  for (const ManifestTask& task : manifest.tasks) {
    size_t mapped = 0;
    Bytes in_layer;
    Bytes with_criu;
    for (const ManifestVma& vma : task.vmas) {
      if (vma.kind == VmaKind::kMapped) ++mapped;
      (vma.kind == VmaKind::kMapped ? in_layer : with_criu) += vma.data;
    }
    text += fmt::format(
        "  {:>7}  {:<16} {:<8} {:>4} of {:>4} VMAs mapped  {:>10} in layers  {:>10} "
        "with criu\n",
        task.vpid, task.comm, task.state, mapped, task.vmas.size(), HumanBytes(in_layer),
        HumanBytes(with_criu));
    if (!with_vmas) continue;
    for (const ManifestVma& vma : task.vmas) {
      text += fmt::format("           {} {} {:<6} {:>10} of {:>10}{}{}{}\n", vma.range,
                          Protection(vma.prot), Word(vma.kind), HumanBytes(vma.data),
                          HumanBytes(vma.range.size()), vma.name.empty() ? "" : "  ", vma.name,
                          LayersOf(vma));
    }
  }
  return text;
}

void ShowText(const std::string& directory, const Manifest& manifest,
              const std::vector<ShownLayer>& layers, bool with_vmas) {
  std::string text = manifest.kind == ImageKind::kMemory
                         ? MemoryText(directory, manifest)
                         : ProcessText(directory, manifest, with_vmas);
  text += "\nlayers\n";
  size_t number = 0;
  for (const ShownLayer& layer : layers) {
    text += fmt::format(
        "  {:>2}  {}  {:>10} of pages, {:>10} on disk, {} extents, {} segments{}{}\n", number++,
        layer.entry.id, HumanBytes(layer.entry.data), HumanBytes(layer.allocated), layer.extents,
        layer.segments, layer.packed.empty() ? "" : ", packed with ", layer.packed);
  }
  if (layers.empty()) text += "  none: no VMA was worth mapping\n";
  Print(text);
}

Result<ShownLayer> OpenPacked(const std::string& directory, const ManifestLayer& entry) {
  const std::string index = LayerIndexPath(directory, entry.id);
  UNMOOR_ASSIGN(const PackedReader packed,
                PackedReader::Open(LayerPackedPath(directory, entry.id), index, &entry));
  return ShownLayer{entry, Allocated(packed.path()) + Allocated(index),
                    packed.index().tables.extents.size(), packed.index().tables.segments.size(),
                    ToString(packed.compression())};
}

Result<std::vector<ShownLayer>> OpenLayers(const std::string& directory, const Manifest& manifest) {
  std::vector<ShownLayer> layers;
  for (const ManifestLayer& entry : manifest.layers) {
    if (IsPackedLayer(directory, entry.id)) {
      UNMOOR_ASSIGN(const ShownLayer layer, OpenPacked(directory, entry));
      layers.push_back(layer);
      continue;
    }
    UNMOOR_ASSIGN(const LayerReader reader, LayerReader::Open(directory, entry));
    const Bytes allocated = Allocated(LayerPagesPath(directory, entry.id)) +
                            Allocated(LayerIndexPath(directory, entry.id));
    layers.push_back({entry, allocated, reader.extents().size(), reader.segments().size(), {}});
  }
  return layers;
}

int RunShow(const ShowArguments& arguments) {
  const auto manifest = ReadManifest(arguments.directory);
  if (!manifest) return Report(manifest.error(), arguments.json);
  const auto layers = OpenLayers(arguments.directory, *manifest);
  if (!layers) return Report(layers.error(), arguments.json);
  const std::string path = RealPath(arguments.directory).value_or(arguments.directory);
  if (arguments.json) {
    ShowJson(path, *manifest, *layers);
  } else {
    ShowText(path, *manifest, *layers, arguments.vmas);
  }
  return kExitSuccess;
}

}  // namespace

Action ConfigureShow(CLI::App& app) {
  const auto arguments = std::make_shared<ShowArguments>();
  SetUsage(app, "Usage: unmoor show -D DIR [--vmas] [--json]");
  app.add_option("-D,--images-dir", arguments->directory, "The image directory")
      ->required()
      ->option_text("DIR");
  app.add_flag("--vmas", arguments->vmas, "Every VMA of every task");
  app.add_flag("--json", arguments->json, "One JSON object on stdout, with everything");
  app.footer(kFooter);
  return [arguments](const Invocation&) { return RunShow(*arguments); };
}

}  // namespace unmoor::cli
