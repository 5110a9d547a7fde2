// See prefetch.h.
#include "restore/prefetch.h"

#include <fcntl.h>

#include "base/log.h"
#include "image/layout.h"
#include "image/packed_layer.h"
#include "os/file.h"
#include "os/storage.h"

namespace unmoor {
namespace {

struct Layer {
  Fd pages;
  std::optional<PackedReader> packed;  // in their place
};

Layer OpenLayer(const std::string& directory, const std::string& id) {
  Layer layer;
  if (IsPackedLayer(directory, id)) {
    auto packed =
        PackedReader::Open(LayerPackedPath(directory, id), LayerIndexPath(directory, id), nullptr);
    if (packed) layer.packed.emplace(*std::move(packed));
  } else if (auto pages = OpenFile(LayerPagesPath(directory, id), O_RDONLY)) {
    layer.pages = *std::move(pages);
    ReadExtents(layer.pages.get());
  }
  return layer;
}

// The frames that `pages` are in.
void StartReadingFrames(const PackedReader& packed, FileRange pages) {
  constexpr uint64_t kPiece = packed_format::kPieceSize;
  for (uint64_t at = pages.begin.value / kPiece * kPiece; at < pages.end.value; at += kPiece) {
    const auto frame = packed.FindFrame(FileOffset(at));
    if (frame) StartReading(packed.file().get(), packed.FileRangeOf(*frame));
  }
}

void Read(const WorkingSet& set, const std::string& directory) {
  std::vector<Layer> layers;
  for (const std::string& id : set.layers) layers.push_back(OpenLayer(directory, id));
  for (const WorkingSetRange& range : MergeForReading(set.ranges)) {
    const Layer& layer = layers[range.layer];
    if (layer.packed) {
      StartReadingFrames(*layer.packed, range.range);
    } else {
      StartReading(layer.pages.get(), range.range);
    }
  }
}

}  // namespace

std::optional<Prefetch> BeginPrefetch(const std::string& directory) {
  auto set = ReadWorkingSet(directory);
  if (!set) {
    spdlog::warn("{}; nothing is read ahead", set.error().message());
    return std::nullopt;
  }
  if (!*set || (*set)->ranges.empty()) return std::nullopt;
  auto daemon = ForkDaemon({}, "", "unmoor-prefetch");
  if (!daemon) {
    spdlog::warn("{}; nothing is read ahead", daemon.error().message());
    return std::nullopt;
  }
  if (!*daemon) {
    Read(**set, directory);
    ExitProcess(0);
  }
  return Prefetch{**std::move(daemon), **std::move(set)};
}

}  // namespace unmoor
