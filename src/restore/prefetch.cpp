// See prefetch.h.
#include "restore/prefetch.h"

#include <fcntl.h>

#include "base/log.h"
#include "image/layout.h"
#include "os/file.h"
#include "os/storage.h"

namespace unmoor {
namespace {

void Read(const WorkingSet& set, const std::string& directory) {
  std::vector<Fd> layers;
  for (const std::string& id : set.layers) {
    auto fd = OpenFile(LayerPagesPath(directory, id), O_RDONLY);
    layers.push_back(fd ? *std::move(fd) : Fd());
    ReadExtents(layers.back().get());
  }
  for (const WorkingSetRange& range : MergeForReading(set.ranges)) {
    StartReading(layers[range.layer].get(), range.range);
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
