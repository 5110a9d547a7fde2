// See prefetch.h.
#include "restore/prefetch.h"

#include <fcntl.h>

#include "base/log.h"
#include "image/layout.h"
#include "os/file.h"

namespace unmoor {
namespace {

constexpr uint64_t kLargestGap = 64 << 10;

void Read(const WorkingSet& set, const std::string& directory) {
  std::vector<Fd> layers;
  for (const std::string& id : set.layers) {
    auto fd = OpenFile(LayerPagesPath(directory, id), O_RDONLY);
    layers.push_back(fd ? *std::move(fd) : Fd());
  }
  for (const WorkingSetRange& range : MergeForReading(set.ranges)) {
    StartReading(layers[range.layer].get(), range.range);
  }
}

}  // namespace

std::vector<WorkingSetRange> MergeForReading(const std::vector<WorkingSetRange>& ranges) {
  std::vector<WorkingSetRange> merged;
  for (const WorkingSetRange& range : ranges) {
    if (!merged.empty() && merged.back().layer == range.layer &&
        merged.back().range.end <= range.range.begin &&
        (range.range.begin - merged.back().range.end).value <= kLargestGap) {
      merged.back().range.end = range.range.end;
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

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
