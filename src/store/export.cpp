// See export.h.
#include "store/export.h"

#include <fcntl.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "criu/page_images.h"
#include "criu/page_runs.h"
#include "image/directory_lock.h"
#include "image/layout.h"
#include "image/publisher.h"
#include "os/file.h"
#include "store/stored_image.h"

namespace unmoor {
namespace {

constexpr uint64_t kChunk = uint64_t{1} << 20;

bool IsPages(std::string_view name) {
  return name.starts_with("pages-") && name.ends_with(".img");
}

class Exporter {
 public:
  explicit Exporter(const ExportOptions& options) : options_(options) {}
  [[nodiscard]] Result<ExportReport> Run();

 private:
  [[nodiscard]] Result<> Open();
  [[nodiscard]] Result<> ExportStream(criu::PageStreamId id, criu::PageImageWriter& writer);
  [[nodiscard]] Result<> Write(criu::PageStreamId id, const criu::PageRun& run,
                               criu::PageImageWriter& writer);
  void Tell(Bytes more);

  const ExportOptions& options_;
  DirectoryLock lock_;
  std::optional<StoredImage> image_;
  ExportReport report_;
  Bytes total_;
};

Result<> Exporter::Open() {
  UNMOOR_ASSIGN(lock_, DirectoryLock::Take(options_.directory, LockUse::kRead));
  UNMOOR_ASSIGN(StoredImage image, StoredImage::Open(options_.directory));
  image_.emplace(std::move(image));
  if (image_->manifest().kind != ImageKind::kProcess) {
    return UserError("{} is an image of memory, not of a process; criu cannot use it",
                     image_->directory());
  }
  UNMOOR_TRY(image_->LoadHashes());
  for (const ManifestTask& task : image_->manifest().tasks) {
    for (const ManifestVma& vma : task.vmas) total_ += vma.data;
  }
  return {};
}

void Exporter::Tell(Bytes more) {
  report_.pages += more;
  if (options_.progress) options_.progress(report_.pages, std::max(total_, report_.pages));
}

Result<> Exporter::Write(criu::PageStreamId id, const criu::PageRun& run,
                         criu::PageImageWriter& writer) {
  const auto& [range, flags, offset] = run.entry;
  if (run.fd < 0) return writer.Absent(id, range, flags);
  std::vector<std::byte> buffer(std::min(kChunk, range.size().value));
  for (Bytes done; done < range.size(); done += Bytes(buffer.size())) {
    buffer.resize(std::min<uint64_t>(kChunk, (range.size() - done).value));
    UNMOOR_TRY(ReadExactlyAt(run.fd, buffer, offset + done, *run.path));
    UNMOOR_TRY(writer.Pages(id, range.begin + done, flags, buffer));
    Tell(Bytes(buffer.size()));
  }
  return {};
}

Result<> Exporter::ExportStream(criu::PageStreamId id, criu::PageImageWriter& writer) {
  const std::string criu_directory = CriuDirectory(image_->directory());
  UNMOOR_ASSIGN(const criu::Pagemap pagemap, criu::ReadPagemap(criu_directory, id));
  const std::string pages_path = criu_directory + "/" + criu::PagesName(pagemap.pages_id);
  Fd pages;
  if (pagemap.PresentBytes().value > 0) {
    UNMOOR_ASSIGN(pages, OpenRegularFile(pages_path));
  }
  std::vector<criu::PageRun> runs = criu::RunsOf(pagemap, pages.get(), pages_path);
  if (id.kind == criu::StreamKind::kTask) {
    ++report_.tasks;
    for (const ManifestTask& task : image_->manifest().tasks) {
      if (task.vpid != id.id) continue;
      UNMOOR_ASSIGN(const std::vector<OverlayRun> layer, image_->LayerPages(task));
      for (const OverlayRun& run : layer) UNMOOR_TRY(image_->VerifyRun(run));
      // CRIU's first: where all of a task's pages are in layers, one is in both.
      runs = criu::MergeRuns(image_->ToPageRuns(layer), runs);
    }
  }
  UNMOOR_TRY(writer.Open(id));
  for (const criu::PageRun& run : runs) UNMOOR_TRY(Write(id, run, writer));
  return {};
}

Result<ExportReport> Exporter::Run() {
  UNMOOR_TRY(Open());
  if (const auto there = ListDirectory(options_.out); there && !there->empty()) {
    return UserError("{} is not empty; give a new directory", options_.out);
  }
  UNMOOR_ASSIGN(Publisher publisher, Publisher::Begin(options_.out));
  const std::string criu_directory = CriuDirectory(image_->directory());
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(criu_directory));
  criu::PageImageWriter writer(publisher.path());
  for (const std::string& name : names) {
    const auto stream = criu::ParsePagemapName(name);
    if (stream) {
      UNMOOR_TRY(ExportStream(*stream, writer));
    } else if (!IsPages(name)) {
      UNMOOR_TRY(CopyRegularFile(criu_directory + "/" + name, publisher.path() + "/" + name));
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
