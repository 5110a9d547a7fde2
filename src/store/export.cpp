// See export.h.
#include "store/export.h"

#include <fcntl.h>

#include <algorithm>
#include <charconv>
#include <optional>
#include <vector>

#include "criu/page_images.h"
#include "image/directory_lock.h"
#include "image/layer_reader.h"
#include "image/layout.h"
#include "image/manifest.h"
#include "image/overlay.h"
#include "image/publisher.h"
#include "os/file.h"

namespace unmoor {
namespace {

constexpr uint64_t kChunk = uint64_t{1} << 20;
constexpr std::string_view kShmemPrefix = "pagemap-shmem-";
constexpr std::string_view kTaskPrefix = "pagemap-";
constexpr std::string_view kSuffix = ".img";

// A run of pages and where they are: in an open file, or (no file) only noted.
struct Piece {
  VaddrRange range;
  int fd = -1;
  FileOffset offset;
  uint32_t flags = criu::kPagePresent;
  const std::string* path = nullptr;
};

// "pagemap-12.img" or "pagemap-shmem-34.img".
std::optional<criu::PageStreamId> StreamOf(std::string_view name) {
  if (!name.starts_with(kTaskPrefix) || !name.ends_with(kSuffix)) return std::nullopt;
  criu::PageStreamId id;
  if (name.starts_with(kShmemPrefix)) id.kind = criu::StreamKind::kSharedMemory;
  name.remove_prefix(name.starts_with(kShmemPrefix) ? kShmemPrefix.size() : kTaskPrefix.size());
  name.remove_suffix(kSuffix.size());
  const auto parsed = std::from_chars(name.data(), name.data() + name.size(), id.id);
  if (parsed.ec != std::errc() || parsed.ptr != name.data() + name.size()) return std::nullopt;
  return id;
}

bool IsPages(std::string_view name) {
  return name.starts_with("pages-") && name.ends_with(kSuffix);
}

// `below` where `above` has nothing; both ascending and apart. Ascending.
std::vector<Piece> Merge(const std::vector<Piece>& below, const std::vector<Piece>& above) {
  std::vector<Piece> result = above;
  auto top = above.begin();
  for (const Piece& piece : below) {
    Vaddr at = piece.range.begin;
    while (top != above.end() && top->range.end <= at) ++top;
    for (auto cover = top; at < piece.range.end;) {
      const Vaddr end = cover == above.end() ? piece.range.end
                                             : std::min(piece.range.end, cover->range.begin);
      if (at < end) {
        Piece part = piece;
        part.range = {at, end};
        part.offset = piece.offset + (at - piece.range.begin);
        result.push_back(part);
      }
      if (cover == above.end()) break;
      at = std::max(at, cover->range.end);
      ++cover;
    }
  }
  std::ranges::sort(result, {}, [](const Piece& piece) { return piece.range.begin; });
  return result;
}

class Exporter {
 public:
  explicit Exporter(const ExportOptions& options) : options_(options) {}
  [[nodiscard]] Result<ExportReport> Run();

 private:
  [[nodiscard]] Result<> Open();
  [[nodiscard]] Result<> ExportStream(criu::PageStreamId id, criu::PageImageWriter& writer);
  [[nodiscard]] Result<std::vector<Piece>> LayerPieces(const ManifestTask& task) const;
  [[nodiscard]] Result<> Write(criu::PageStreamId id, const Piece& piece,
                               criu::PageImageWriter& writer);
  void Tell(Bytes more);

  const ExportOptions& options_;
  DirectoryLock lock_;
  std::string directory_;
  Manifest manifest_;
  std::vector<LayerReader> layers_;
  std::optional<Overlay> overlay_;
  ExportReport report_;
  Bytes total_;
};

Result<> Exporter::Open() {
  UNMOOR_ASSIGN(lock_, DirectoryLock::Take(options_.directory, LockUse::kRead));
  UNMOOR_ASSIGN(manifest_, ReadManifest(options_.directory));
  UNMOOR_ASSIGN(directory_, RealPath(options_.directory));
  if (manifest_.kind != ImageKind::kProcess) {
    return UserError("{} is an image of memory, not of a process; criu cannot use it", directory_);
  }
  for (const ManifestLayer& entry : manifest_.layers) {
    UNMOOR_ASSIGN(LayerReader reader, LayerReader::Open(directory_, entry));
    UNMOOR_TRY(reader.LoadHashes());
    layers_.push_back(std::move(reader));
  }
  std::vector<const LayerInfo*> infos;
  for (const LayerReader& layer : layers_) infos.push_back(&layer.info());
  overlay_.emplace(infos, directory_);
  for (const ManifestTask& task : manifest_.tasks) {
    for (const ManifestVma& vma : task.vmas) total_ += vma.data;
  }
  return {};
}

void Exporter::Tell(Bytes more) {
  report_.pages += more;
  if (options_.progress) options_.progress(report_.pages, std::max(total_, report_.pages));
}

Result<std::vector<Piece>> Exporter::LayerPieces(const ManifestTask& task) const {
  std::vector<Piece> pieces;
  for (const ManifestVma& vma : task.vmas) {
    if (vma.kind != VmaKind::kMapped) continue;
    UNMOOR_ASSIGN(const VmaPages pages, overlay_->Resolve(task.vpid, vma));
    for (const OverlayRun& run : pages.all) {
      const LayerReader& layer = layers_[run.layer];
      UNMOOR_TRY(layer.VerifyBlocks({run.offset, run.offset + run.range.size()}));
      pieces.push_back({run.range, layer.pages_fd().get(), run.offset, criu::kPagePresent,
                        &layer.pages_path()});
    }
  }
  return pieces;
}

Result<> Exporter::Write(criu::PageStreamId id, const Piece& piece,
                         criu::PageImageWriter& writer) {
  if (piece.fd < 0) return writer.Absent(id, piece.range, piece.flags);
  std::vector<std::byte> buffer(std::min(kChunk, piece.range.size().value));
  for (Bytes done; done < piece.range.size(); done += Bytes(buffer.size())) {
    buffer.resize(std::min<uint64_t>(kChunk, (piece.range.size() - done).value));
    UNMOOR_TRY(ReadExactlyAt(piece.fd, buffer, piece.offset + done, *piece.path));
    UNMOOR_TRY(writer.Pages(id, piece.range.begin + done, piece.flags, buffer));
    Tell(Bytes(buffer.size()));
  }
  return {};
}

Result<> Exporter::ExportStream(criu::PageStreamId id, criu::PageImageWriter& writer) {
  const std::string criu_directory = CriuDirectory(directory_);
  UNMOOR_ASSIGN(const criu::Pagemap pagemap, criu::ReadPagemap(criu_directory, id));
  const std::string pages_path = criu_directory + "/" + criu::PagesName(pagemap.pages_id);
  Fd pages;
  if (pagemap.PresentBytes().value > 0) {
    UNMOOR_ASSIGN(pages, OpenFile(pages_path, O_RDONLY));
  }
  std::vector<Piece> pieces;
  for (const criu::PagemapEntry& entry : pagemap.entries) {
    const bool present = (entry.flags & criu::kPagePresent) != 0;
    pieces.push_back({entry.range, present ? pages.get() : -1, entry.pages, entry.flags, &pages_path});
  }
  if (id.kind == criu::StreamKind::kTask) {
    ++report_.tasks;
    for (const ManifestTask& task : manifest_.tasks) {
      if (task.vpid != id.id) continue;
      UNMOOR_ASSIGN(const std::vector<Piece> layer, LayerPieces(task));
      // CRIU's first: where all of a task's pages are in layers, one is in both.
      pieces = Merge(layer, pieces);
    }
  }
  UNMOOR_TRY(writer.Open(id));
  for (const Piece& piece : pieces) UNMOOR_TRY(Write(id, piece, writer));
  return {};
}

Result<ExportReport> Exporter::Run() {
  UNMOOR_TRY(Open());
  if (const auto there = ListDirectory(options_.out); there && !there->empty()) {
    return UserError("{} is not empty; give a new directory", options_.out);
  }
  UNMOOR_ASSIGN(Publisher publisher, Publisher::Begin(options_.out));
  const std::string criu_directory = CriuDirectory(directory_);
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(criu_directory));
  criu::PageImageWriter writer(publisher.path());
  for (const std::string& name : names) {
    const auto stream = StreamOf(name);
    if (stream) {
      UNMOOR_TRY(ExportStream(*stream, writer));
    } else if (!IsPages(name)) {
      UNMOOR_TRY(CopyFile(criu_directory + "/" + name, publisher.path() + "/" + name));
    }
  }
  UNMOOR_TRY(writer.Finish(false));
  UNMOOR_TRY(publisher.Publish());
  report_.directory = publisher.target();
  return std::move(report_);
}

}  // namespace

Result<ExportReport> Export(const ExportOptions& options) {
  return Exporter(options).Run();
}

}  // namespace unmoor
