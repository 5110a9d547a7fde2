// See stored_image.h.
#include "store/stored_image.h"

#include <algorithm>

#include "os/file.h"

namespace unmoor {

Result<StoredImage> StoredImage::Open(const std::string& directory) {
  StoredImage image;
  UNMOOR_ASSIGN(image.manifest_, ReadManifest(directory));
  UNMOOR_ASSIGN(image.directory_, RealPath(directory));
  for (const ManifestLayer& entry : image.manifest_.layers) {
    UNMOOR_ASSIGN(LayerReader reader, LayerReader::Open(image.directory_, entry));
    image.layers_.push_back(std::move(reader));
  }
  std::vector<const LayerInfo*> infos;
  for (const LayerReader& layer : image.layers_) infos.push_back(&layer.info());
  image.overlay_.emplace(infos, image.directory_);
  return image;
}

Result<> StoredImage::LoadHashes() {
  for (LayerReader& layer : layers_) UNMOOR_TRY(layer.LoadHashes());
  return {};
}

Result<> StoredImage::VerifyRun(const OverlayRun& run) const {
  return layers_[run.layer].VerifyBlocks({run.offset, run.offset + run.range.size()});
}

Result<std::vector<OverlayRun>> StoredImage::LayerPages(const ManifestTask& task) const {
  std::vector<OverlayRun> runs;
  for (const ManifestVma& vma : task.vmas) {
    if (vma.kind != VmaKind::kMapped) continue;
    UNMOOR_ASSIGN(const VmaPages pages, Resolve(task.vpid, vma));
    runs.insert(runs.end(), pages.all.begin(), pages.all.end());
  }
  return runs;
}

std::vector<criu::PageRun> StoredImage::ToPageRuns(const std::vector<OverlayRun>& runs) const {
  std::vector<criu::PageRun> result;
  for (const OverlayRun& run : runs) {
    const LayerReader& layer = layers_[run.layer];
    result.push_back(
        {{run.range, criu::kPagePresent, run.offset}, layer.pages_fd().get(), &layer.pages_path()});
  }
  return result;
}

Result<Bytes> StoredImage::ShownBytes() const {
  std::vector<std::pair<uint32_t, FileRange>> shown;
  for (const ManifestTask& task : manifest_.tasks) {
    UNMOOR_ASSIGN(const std::vector<OverlayRun> runs, LayerPages(task));
    for (const OverlayRun& run : runs) {
      shown.push_back({run.layer, {run.offset, run.offset + run.range.size()}});
    }
  }
  std::ranges::sort(shown);
  Bytes sum;
  std::pair<uint32_t, FileOffset> end{};
  for (const auto& [layer, range] : shown) {
    const FileOffset begin = end.first == layer ? std::max(end.second, range.begin) : range.begin;
    if (begin < range.end) sum += range.end - begin;
    end = {layer, std::max(begin, range.end)};
  }
  return sum;
}

}  // namespace unmoor
