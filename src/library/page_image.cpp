// PageImage: opening and verifying. See unmoor/page_image.h; the writer is in
// page_image_writer.cpp.
#include "unmoor/page_image.h"

#include <cerrno>

#include "image/layer_reader.h"
#include "image/layout.h"
#include "library/page_image_impl.h"
#include "library/status_from.h"
#include "os/file.h"

namespace unmoor {
inline namespace v1 {
namespace {

using Impl = PageImage::Impl;

Status ReadHead(const std::string& dir, const OpenOptions& options, Impl& image) {
  auto manifest = ReadManifest(dir);
  if (!manifest) {
    const bool there = Exists(ManifestPath(dir));
    return StatusFrom(manifest.error(), there ? StatusCode::kDamaged : StatusCode::kNotFound);
  }
  image.manifest = *std::move(manifest);
  if (image.manifest.kind != ImageKind::kMemory) {
    return MakeStatus(StatusCode::kUnsupported,
                      "{} is a checkpoint of a process; `unmoor restore` brings it back", dir);
  }
  UNMOOR_STATUS_ASSIGN(const HostFacts host, ReadHostFacts());
  if (const auto fits = CheckHost(image.manifest, host); !fits && options.check_cpu) {
    return StatusFrom(fits.error().WithContext(dir), StatusCode::kUnsupported);
  }
  UNMOOR_STATUS_ASSIGN(image.directory, RealPath(dir));
  image.parent_id = image.manifest.parent_id.value_or("");
  return {};
}

Result<> ReadLayers(Impl& image) {
  std::vector<const LayerInfo*> infos;
  for (const ManifestLayer& entry : image.manifest.layers) {
    UNMOOR_ASSIGN(LayerReader reader, LayerReader::Open(image.directory, entry));
    image.layers.push_back(std::make_shared<const SharedLayer>(std::move(reader)));
    infos.push_back(&image.layers.back()->reader().info());
  }
  const Overlay overlay(infos, image.directory);
  for (const ManifestVma& vma : image.vmas()) {
    UNMOOR_ASSIGN(VmaPages pages, overlay.Resolve(kMemoryTask, vma));
    if (pages.data != vma.data) {
      return UserError("{}: {} holds {} of data, its manifest says {}", image.directory, vma.range,
                       pages.data.value, vma.data.value);
    }
    image.pages.push_back(std::move(pages));
  }
  if (!image.manifest.user_data) return {};
  UNMOOR_ASSIGN(image.user_data, ReadUserData(image.directory, *image.manifest.user_data));
  return {};
}

void CollectRanges(Impl& image) {
  for (const ManifestVma& vma : image.vmas()) {
    if (!image.ranges.empty()) {
      ImageRange& last = image.ranges.back();
      if (last.address + last.size == vma.range.begin.value && last.protection == vma.prot) {
        last.size += vma.range.size().value;
        last.data_bytes += vma.data.value;
        continue;
      }
    }
    image.ranges.push_back(
        {vma.range.begin.value, vma.range.size().value, vma.prot, vma.data.value});
  }
}

}  // namespace

Result<> SharedLayer::LoadHashes() const {
  const std::lock_guard lock(mutex_);
  return reader_.LoadHashes();
}

PageImage::PageImage(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

StatusOr<PageImage> PageImage::Open(const std::string& dir, const OpenOptions& options) {
  auto image = std::make_shared<Impl>();
  if (Status status = ReadHead(dir, options, *image); !status.ok()) return status;
  if (const auto read = ReadLayers(*image); !read) {
    return StatusFrom(read.error(), StatusCode::kDamaged);
  }
  CollectRanges(*image);
  return PageImage(std::move(image));
}

const std::string& PageImage::directory() const {
  return impl_->directory;
}
const std::string& PageImage::id() const {
  return impl_->manifest.checkpoint_id;
}
const std::string& PageImage::parent_id() const {
  return impl_->parent_id;
}
const std::vector<ImageRange>& PageImage::ranges() const {
  return impl_->ranges;
}
const std::string& PageImage::user_data() const {
  return impl_->user_data;
}

Status PageImage::Verify() const {
  for (const auto& layer : impl_->layers) {
    if (const auto loaded = layer->LoadHashes(); !loaded) {
      return StatusFrom(loaded.error(), StatusCode::kDamaged);
    }
    if (const auto verified = layer->reader().VerifyAll(); !verified) {
      return StatusFrom(verified.error(), StatusCode::kDamaged);
    }
  }
  return {};
}

}  // namespace v1
}  // namespace unmoor
