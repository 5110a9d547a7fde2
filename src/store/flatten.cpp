// See flatten.h.
#include "store/flatten.h"

#include <fcntl.h>

#include <algorithm>
#include <map>
#include <optional>
#include <vector>

#include "base/fault_point.h"
#include "image/delta_writer.h"
#include "image/directory_lock.h"
#include "image/layout.h"
#include "image/publisher.h"
#include "os/file.h"
#include "store/stored_image.h"

namespace unmoor {
namespace {

constexpr uint64_t kChunk = uint64_t{1} << 20;
constexpr Bytes kWorthFlattening(uint64_t{64} << 20);

ChainLength Measure(const StoredImage& image, Bytes shown) {
  ChainLength chain;
  chain.layers = image.layers().size();
  for (const LayerReader& layer : image.layers()) chain.pages += layer.info().data_bytes;
  chain.shown = shown;
  return chain;
}

// Bytes that are one page of one file in both.
Bytes CommonBytes(const std::vector<OverlayRun>& a, const std::vector<OverlayRun>& b) {
  Bytes sum;
  if (a.empty()) return sum;
  auto other = std::ranges::partition_point(
      b, [&](const OverlayRun& run) { return run.range.end <= a.front().range.begin; });
  for (const OverlayRun& run : a) {
    while (other != b.end() && other->range.end <= run.range.begin) ++other;
    for (auto it = other; it != b.end() && it->range.begin < run.range.end; ++it) {
      const VaddrRange part = run.range.Intersect(it->range);
      if (run.layer == it->layer && run.offset + (part.begin - run.range.begin) ==
                                        it->offset + (part.begin - it->range.begin)) {
        sum += part.size();
      }
    }
  }
  return sum;
}

class Flattener {
 public:
  Flattener(const FlattenOptions& options, const StoredImage& image)
      : options_(options), image_(image) {}

  // Writes the flat checkpoint into `directory`, which is empty. Returns the pages of its layer.
  [[nodiscard]] Result<Bytes> Write(const std::string& directory, Bytes total);

 private:
  [[nodiscard]] Result<std::vector<DeltaVma>> PlanTask(const ManifestTask& task);
  [[nodiscard]] Result<> WriteTask(const ManifestTask& task);

  const FlattenOptions& options_;
  const StoredImage& image_;
  std::optional<DeltaWriter> writer_;
  std::map<uint32_t, std::vector<OverlayRun>> pages_;  // of the tasks written so far
  Bytes done_;
  Bytes total_;
};

// A child's VMA stands on its parent's where most of both is the same pages already.
Result<std::vector<DeltaVma>> Flattener::PlanTask(const ManifestTask& task) {
  std::vector<DeltaVma> vmas;
  for (const ManifestVma& vma : task.vmas) {
    if (vma.kind != VmaKind::kMapped) continue;
    DeltaVma item{vma.range, {}};
    if (const auto owner = pages_.find(task.ppid); owner != pages_.end()) {
      UNMOOR_ASSIGN(const VmaPages pages, image_.Resolve(task.vpid, vma));
      const Bytes common = CommonBytes(pages.all, owner->second);
      if (common > Bytes(0) && (pages.data - common).value * 4 <= pages.data.value) {
        UNMOOR_ASSIGN(item.base, writer_->FindShared(task.ppid, vma.range));
        if (item.base && !IsWorthwhile(*item.base, pages.data)) item.base.reset();
      }
    }
    vmas.push_back(std::move(item));
  }
  return vmas;
}

Result<> Flattener::WriteTask(const ManifestTask& task) {
  UNMOOR_ASSIGN(std::vector<DeltaVma> vmas, PlanTask(task));
  UNMOOR_TRY(writer_->AddTask(task.vpid, std::move(vmas)));
  UNMOOR_ASSIGN(std::vector<OverlayRun> runs, image_.LayerPages(task));
  std::vector<std::byte> buffer;
  for (const OverlayRun& run : runs) {
    UNMOOR_TRY(image_.VerifyRun(run));
    const LayerReader& layer = image_.layers()[run.layer];
    for (Bytes at; at < run.range.size(); at += Bytes(buffer.size())) {
      buffer.resize(std::min(kChunk, (run.range.size() - at).value));
      UNMOOR_TRY(
          ReadExactlyAt(layer.pages_fd().get(), buffer, run.offset + at, layer.pages_path()));
      UNMOOR_TRY(writer_->Write(task.vpid, run.range.begin + at, buffer));
      done_ += Bytes(buffer.size());
      if (options_.progress) options_.progress(done_, std::max(done_, total_));
    }
  }
  pages_[task.vpid] = std::move(runs);
  return {};
}

// Files that no flatten changes: linked, as dumps link layers.
Result<> LinkFiles(const std::string& from, const std::string& to) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(from));
  UNMOOR_TRY(MakeDirectory(to, 0700));
  for (const std::string& name : names) {
    UNMOOR_ASSIGN(const Fd fd, OpenFile(from + "/" + name, O_RDONLY | O_NOFOLLOW));
    UNMOOR_TRY(LinkOrCopyFile(fd.get(), to + "/" + name));
  }
  return {};
}

Result<Bytes> Flattener::Write(const std::string& directory, Bytes total) {
  total_ = total;
  Manifest manifest = image_.manifest();
  manifest.layers.clear();
  UNMOOR_ASSIGN(const std::string id, NewId());
  UNMOOR_TRY(MakeDirectory(LayersDirectory(directory), 0700));
  writer_.emplace(LayersDirectory(directory), id, std::span<const LayerReader>(),
                  manifest.tasks.size() > 1);
  for (const ManifestTask& task : image_.manifest().tasks) UNMOOR_TRY(WriteTask(task));
  UNMOOR_TRY(FaultPoint("flatten.pages_written"));
  UNMOOR_ASSIGN(const std::optional<LayerInfo> layer, writer_->Finish(false));
  if (layer) UNMOOR_TRY(writer_->Describe(manifest, *layer, directory));

  const std::string& from = image_.directory();
  if (manifest.kind == ImageKind::kProcess) {
    UNMOOR_TRY(LinkFiles(CriuDirectory(from), CriuDirectory(directory)));
  }
  if (manifest.user_data) {
    UNMOOR_ASSIGN(const Fd fd, OpenFile(UserDataPath(from), O_RDONLY | O_NOFOLLOW));
    UNMOOR_TRY(LinkOrCopyFile(fd.get(), UserDataPath(directory)));
  }
  UNMOOR_TRY(WriteManifest(directory, manifest));
  UNMOOR_TRY(FaultPoint("flatten.before_publish"));
  return layer ? layer->data_bytes : Bytes(0);
}

bool IsSameDirectory(const std::string& a, const std::string& b) {
  const auto left = RealPath(a);
  const auto right = RealPath(b);
  return left && right && *left == *right;
}

}  // namespace

Result<FlattenReport> Flatten(const FlattenOptions& options) {
  const bool replaces = options.out.empty() || IsSameDirectory(options.directory, options.out);
  UNMOOR_TRY(ReadManifest(options.directory));  // says what it is, if it is none
  DirectoryLock lock;
  if (!replaces) {
    UNMOOR_ASSIGN(lock, DirectoryLock::Take(options.directory, LockUse::kRead));
  }
  // Locks the directory it is to replace; what is read below is what is there then.
  UNMOOR_ASSIGN(Publisher publisher, Publisher::Begin(replaces ? options.directory : options.out));
  UNMOOR_ASSIGN(StoredImage image, StoredImage::Open(options.directory));
  UNMOOR_ASSIGN(const Bytes shown, image.ShownBytes());
  const ChainLength chain = Measure(image, shown);
  FlattenReport report;
  report.directory = publisher.target();
  report.layers_before = chain.layers;
  report.layer_bytes_before = chain.pages;
  if (replaces && chain.flat()) {
    report.was_flat = true;
    return report;
  }
  UNMOOR_TRY(image.LoadHashes());
  UNMOOR_ASSIGN(report.written, Flattener(options, image).Write(publisher.path(), shown));
  UNMOOR_TRY(publisher.Publish());
  return report;
}

Result<ChainLength> MeasureChain(const std::string& directory) {
  UNMOOR_ASSIGN(const StoredImage image, StoredImage::Open(directory));
  UNMOOR_ASSIGN(const Bytes shown, image.ShownBytes());
  return Measure(image, shown);
}

bool IsWorthFlattening(const ChainLength& chain, size_t most_layers) {
  if (chain.layers > most_layers) return true;
  return chain.dead() > chain.shown && chain.dead() > kWorthFlattening;
}

}  // namespace unmoor
