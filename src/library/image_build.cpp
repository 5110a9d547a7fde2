// See image_build.h.
#include "library/image_build.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <optional>

#include "image/layer_writer.h"
#include "image/layout.h"
#include "library/status_from.h"
#include "os/file.h"
#include "os/own_memory.h"
#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor {
inline namespace v1 {
namespace {

constexpr uint64_t kChunk = uint64_t{1} << 20;

class Builder {
 public:
  Builder(Publisher& publisher, const BuildRequest& request)
      : publisher_(publisher), request_(request), memory_(kChunk), base_(kChunk) {}

  [[nodiscard]] Result<ImageReport> Run() {
    UNMOOR_TRY(WritePages());
    UNMOOR_TRY(DescribeRanges());
    UNMOOR_TRY(Finish());
    return report_;
  }
  // Set when the failure was a PageSource's.
  [[nodiscard]] const std::optional<Status>& source_status() const { return source_status_; }

 private:
  [[nodiscard]] Result<> WritePages() {
    std::vector<VaddrRange> vmas;
    bool over_base = false;
    for (const PlannedRange& range : request_.ranges) {
      vmas.push_back(range.range);
      over_base = over_base || range.base_vma >= 0;
    }
    UNMOOR_ASSIGN(const std::string id, NewId());
    std::optional<SignalsBlocked> blocked(std::in_place);
    UNMOOR_ASSIGN(LayerWriter writer,
                  LayerWriter::Create(LayersDirectory(publisher_.path()), id, WriteBack::kLater,
                                      over_base ? ZeroPages::kKeep : ZeroPages::kHole));
    blocked.reset();
    UNMOOR_TRY(writer.AddTask(kMemoryTask, vmas));
    for (const PlannedRange& range : request_.ranges) {
      for (const VaddrRange& run : range.look_at) {
        for (Vaddr at = run.begin; at < run.end;) {
          const VaddrRange chunk{at, std::min(run.end, at + Bytes(kChunk))};
          UNMOOR_TRY(WriteChunk(writer, range, chunk));
          at = chunk.end;
        }
      }
    }
    UNMOOR_ASSIGN(new_layer_, writer.Finish(false));
    return {};
  }

  // The pages of `chunk` that differ from the base, or from zeros where there is none.
  [[nodiscard]] Result<> WriteChunk(LayerWriter& writer, const PlannedRange& range,
                                    VaddrRange chunk) {
    const std::span memory = std::span(memory_).first(chunk.size().value);
    UNMOOR_TRY(ReadPages(range, chunk, memory));
    const std::span base = std::span(base_).first(chunk.size().value);
    std::memset(base.data(), 0, base.size());
    if (range.base_vma >= 0) UNMOOR_TRY(ReadBase(range, chunk, base));
    const auto same = [&](size_t at) {
      return std::memcmp(&memory[at], &base[at], kPageSize) == 0;
    };
    for (size_t at = 0; at < memory.size();) {
      const bool skip = same(at);
      size_t end = at + kPageSize;
      while (end < memory.size() && same(end) == skip) end += kPageSize;
      if (!skip) {
        UNMOOR_TRY(
            writer.Write(kMemoryTask, chunk.begin + Bytes(at), memory.subspan(at, end - at)));
      }
      at = end;
    }
    return {};
  }

  [[nodiscard]] Result<> ReadPages(const PlannedRange& range, VaddrRange chunk,
                                   std::span<std::byte> to) {
    if (!range.source) {
      auto read = ReadOwnMemory(chunk.begin, to);
      if (read || read.error().errnum() != EFAULT) return read;
      return UserError(
          "memory in {} cannot be read: unmapped meanwhile, a guard page, or a "
          "mapping beyond the end of its file",
          chunk);
    }
    Status status = range.source(chunk.begin.value, to.data(), to.size());
    if (status.ok()) return {};
    source_status_ = std::move(status);
    return UserError("{}", source_status_->message());
  }

  [[nodiscard]] Result<> ReadBase(const PlannedRange& range, VaddrRange chunk,
                                  std::span<std::byte> to) const {
    const auto& runs = request_.base->pages[static_cast<size_t>(range.base_vma)].all;
    auto run = std::ranges::partition_point(
        runs, [&](const OverlayRun& r) { return r.range.end <= chunk.begin; });
    for (; run != runs.end() && run->range.begin < chunk.end; ++run) {
      const VaddrRange part = run->range.Intersect(chunk);
      const LayerReader& layer = request_.base->layers[run->layer]->reader();
      UNMOOR_TRY(ReadExactlyAt(layer.pages_fd().get(),
                               to.subspan((part.begin - chunk.begin).value, part.size().value),
                               run->offset + (part.begin - run->range.begin), layer.pages_path()));
    }
    return {};
  }

  // --- The manifest ------------------------------------------------------------------------------

  // Index of a layer of the base in the new manifest; it is linked into the directory once.
  [[nodiscard]] Result<uint32_t> UseBaseLayer(uint32_t index) {
    const auto [known, first] = base_layers_.try_emplace(index, Number(manifest_.layers.size()));
    if (!first) return known->second;
    const LayerReader& layer = request_.base->layers[index]->reader();
    const std::string dir = publisher_.path();
    UNMOOR_TRY(LinkOrCopyFile(layer.pages_fd().get(), LayerPagesPath(dir, layer.id())));
    UNMOOR_TRY(LinkOrCopyFile(layer.index_fd().get(), LayerIndexPath(dir, layer.id())));
    manifest_.layers.push_back(request_.base->manifest.layers[index]);
    infos_.push_back(&layer.info());
    return known->second;
  }
  [[nodiscard]] uint32_t UseNewLayer() {
    if (!new_layer_index_) {
      new_layer_index_ = Number(manifest_.layers.size());
      manifest_.layers.push_back({new_layer_.id, new_layer_.file_size, new_layer_.data_bytes,
                                  new_layer_.allocated, new_layer_.index_checksum});
      infos_.push_back(&new_layer_);
    }
    return *new_layer_index_;
  }
  static uint32_t Number(size_t n) { return static_cast<uint32_t>(n); }

  [[nodiscard]] Result<ManifestVma> Describe(const PlannedRange& range, const Extent& extent) {
    ManifestVma vma;
    vma.range = range.range;
    vma.prot = range.prot;
    vma.kind = VmaKind::kMapped;
    if (range.base_vma < 0) {
      vma.layer = UseNewLayer();
      vma.offset = extent.offset;
      return vma;
    }
    const ManifestVma& base = request_.base->vmas()[static_cast<size_t>(range.base_vma)];
    const Bytes inside = range.range.begin - base.range.begin;
    UNMOOR_ASSIGN(vma.layer, UseBaseLayer(base.layer));
    vma.offset = base.offset + inside;
    for (const ManifestDelta& delta : base.deltas) {
      UNMOOR_ASSIGN(const uint32_t layer, UseBaseLayer(delta.layer));
      vma.deltas.push_back({layer, delta.offset + inside});
    }
    if (extent.data > Bytes(0)) vma.deltas.push_back({UseNewLayer(), extent.offset});
    report_.delta = true;
    return vma;
  }

  [[nodiscard]] Result<> DescribeRanges() {
    std::map<Vaddr, const Extent*> extents;
    for (const Extent& extent : new_layer_.extents) extents.emplace(extent.range.begin, &extent);
    ManifestTask task;
    task.vpid = kMemoryTask;
    task.state = "running";
    UNMOOR_ASSIGN(const ProcessInfo process, ReadProcess(OwnPid()));
    task.comm = process.name;
    for (const PlannedRange& range : request_.ranges) {
      UNMOOR_ASSIGN(ManifestVma vma, Describe(range, *extents.at(range.range.begin)));
      task.vmas.push_back(std::move(vma));
      report_.address_bytes += range.range.size().value;
    }
    const Overlay overlay(infos_, publisher_.path());
    uint64_t data = 0;
    for (ManifestVma& vma : task.vmas) {
      UNMOOR_ASSIGN(const VmaPages pages, overlay.Resolve(kMemoryTask, vma));
      vma.data = pages.data;
      data += pages.data.value;
    }
    manifest_.tasks.push_back(std::move(task));
    report_.written_bytes = new_layer_.data_bytes.value;
    report_.shared_bytes = data - report_.written_bytes;
    return {};
  }

  [[nodiscard]] Result<> Finish() {
    if (!new_layer_index_) {
      UNMOOR_TRY(RemoveFile(LayerPagesPath(publisher_.path(), new_layer_.id)));
      UNMOOR_TRY(RemoveFile(LayerIndexPath(publisher_.path(), new_layer_.id)));
    }
    UNMOOR_ASSIGN(const HostFacts host, ReadHostFacts());
    manifest_.kind = ImageKind::kMemory;
    UNMOOR_ASSIGN(manifest_.checkpoint_id, NewId());
    if (request_.base != nullptr) manifest_.parent_id = request_.base->manifest.checkpoint_id;
    manifest_.created = WallClockNow();
    manifest_.tool_version = UNMOOR_VERSION;
    manifest_.kernel_release = host.kernel_release;
    manifest_.page_size = host.page_size;
    manifest_.cpu_features = host.cpu_features;
    manifest_.root_vpid = kMemoryTask;
    if (!request_.user_data.empty()) {
      UNMOOR_ASSIGN(manifest_.user_data, WriteUserData(publisher_.path(), request_.user_data));
    }
    UNMOOR_TRY(WriteManifest(publisher_.path(), manifest_));
    report_.id = manifest_.checkpoint_id;
    return publisher_.Publish(request_.sync);
  }

  Publisher& publisher_;
  const BuildRequest& request_;
  std::vector<std::byte> memory_;
  std::vector<std::byte> base_;
  LayerInfo new_layer_;
  std::optional<uint32_t> new_layer_index_;
  std::map<uint32_t, uint32_t> base_layers_;  // the base's index -> ours
  std::vector<const LayerInfo*> infos_;       // of manifest_.layers
  Manifest manifest_;
  ImageReport report_;
  std::optional<Status> source_status_;
};

}  // namespace

StatusOr<Publisher> BeginImage(const std::string& dir, bool replace) {
  if (!replace) {
    const auto names = ListDirectory(dir);
    if (names && !names->empty()) {
      return Status(StatusCode::kInvalidArgument,
                    fmt::format("{} exists and is not empty; give a new directory, or ask for an "
                                "image in it to be replaced",
                                dir),
                    EEXIST);
    }
  }
  auto publisher = Publisher::Begin(dir);
  if (!publisher) return StatusFrom(publisher.error());
  return *std::move(publisher);
}

StatusOr<ImageReport> BuildImage(Publisher& publisher, const BuildRequest& request) {
  Builder builder(publisher, request);
  auto report = builder.Run();
  if (report) return *std::move(report);
  if (builder.source_status()) return *builder.source_status();
  return StatusFrom(report.error());
}

}  // namespace v1
}  // namespace unmoor
