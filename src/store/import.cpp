// See import.h.
#include "store/import.h"

#include <fcntl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "base/fault_point.h"
#include "criu/metadata.h"
#include "criu/page_images.h"
#include "image/delta_writer.h"
#include "image/layout.h"
#include "image/manifest.h"
#include "image/publisher.h"
#include "os/file.h"

namespace unmoor {
namespace {

constexpr uint64_t kChunk = uint64_t{1} << 20;
constexpr size_t kMostGenerations = 4096;
// As a dump has it: less stays with CRIU.
constexpr Bytes kLeastMapped{uint64_t{64} << 10};

bool IsPages(std::string_view name) {
  return name.starts_with("pages-") && name.ends_with(".img");
}

// The directory and those before it, youngest first.
Result<std::vector<std::string>> FindGenerations(const std::string& directory) {
  std::vector<std::string> found;
  UNMOOR_ASSIGN(std::string at, RealPath(directory));
  while (std::ranges::find(found, at) == found.end()) {
    if (found.size() == kMostGenerations) {
      return UserError("{}: more than {} parents", directory, kMostGenerations);
    }
    found.push_back(at);
    if (!Exists(at + "/parent")) return found;
    auto parent = RealPath(at + "/parent");
    if (!parent) {
      return UserError("{}/parent leads nowhere: the chain of criu dumps is not complete", at);
    }
    at = *std::move(parent);
  }
  return UserError("{}: its parents lead back to {}", directory, at);
}

// A run of pages in one of the chain's files; no file: there are no pages.
struct ChainRun {
  criu::PagemapEntry entry;
  const std::string* file = nullptr;
};

// The pages of one stream, wherever in the chain they are.
class ChainPages {
 public:
  explicit ChainPages(const std::vector<std::string>& generations) : generations_(generations) {}

  [[nodiscard]] Result<std::vector<ChainRun>> Resolve(criu::PageStreamId id) {
    std::vector<ChainRun> runs;
    std::vector<VaddrRange> wanted = {{Vaddr(0), Vaddr(~uint64_t{0})}};
    for (const std::string& directory : generations_) {
      UNMOOR_ASSIGN(const criu::Pagemap pagemap, criu::ReadPagemap(directory, id));
      UNMOOR_ASSIGN(const std::string* const file, OpenPages(directory, pagemap));
      std::vector<VaddrRange> in_parent;
      const bool youngest = &directory == &generations_.front();
      UNMOOR_TRY(Take(pagemap, wanted, youngest, file, runs, in_parent,
                      directory + "/" + criu::PagemapName(id)));
      wanted = std::move(in_parent);
      if (wanted.empty()) break;
    }
    if (!wanted.empty()) {
      return UserError("{}/{}: pages at {:#x} are in a parent, which is not there (link 'parent')",
                       generations_.back(), criu::PagemapName(id), wanted.front().begin.value);
    }
    std::ranges::sort(runs, {}, [](const ChainRun& run) { return run.entry.range.begin; });
    return runs;
  }

  // `to` is filled from `offset` of the run's file.
  [[nodiscard]] Result<> Read(const ChainRun& run, Bytes offset, std::span<std::byte> to) {
    if (run.file != open_name_) {
      UNMOOR_ASSIGN(open_, OpenRegularFile(*run.file));
      open_name_ = run.file;
    }
    return ReadExactlyAt(open_.get(), to, run.entry.pages + offset, *run.file);
  }

 private:
  // The name of the pages file, which must be as long as its pagemap says.
  [[nodiscard]] Result<const std::string*> OpenPages(const std::string& directory,
                                                     const criu::Pagemap& pagemap) {
    const std::string* const name =
        &*files_.insert(directory + "/" + criu::PagesName(pagemap.pages_id)).first;
    if (pagemap.PresentBytes() == Bytes(0)) return name;
    UNMOOR_ASSIGN(const struct stat info, Stat(*name));
    if (static_cast<uint64_t>(info.st_size) == pagemap.PresentBytes().value) return name;
    return UserError(
        "{} has {} bytes, its pagemap speaks of {}: it is truncated, or compressed by criu, which "
        "cannot be imported",
        *name, info.st_size, pagemap.PresentBytes().value);
  }

  // Of the ranges wanted: what this generation has, and what its parent is said to have.
  [[nodiscard]] static Result<> Take(const criu::Pagemap& pagemap,
                                     const std::vector<VaddrRange>& wanted, bool youngest,
                                     const std::string* file, std::vector<ChainRun>& runs,
                                     std::vector<VaddrRange>& in_parent, const std::string& name) {
    auto entry = pagemap.entries.begin();
    for (const VaddrRange& range : wanted) {
      Vaddr covered = range.begin;
      while (entry != pagemap.entries.end() && entry->range.end <= range.begin) ++entry;
      for (auto it = entry; it != pagemap.entries.end() && it->range.begin < range.end; ++it) {
        const VaddrRange part = it->range.Intersect(range);
        if (!youngest && part.begin != covered) break;
        covered = part.end;
        if ((it->flags & criu::kPageInParent) != 0) {
          in_parent.push_back(part);
          continue;
        }
        const bool present = (it->flags & criu::kPagePresent) != 0;
        runs.push_back({{part, it->flags, it->pages + (part.begin - it->range.begin)},
                        present ? file : nullptr});
      }
      if (!youngest && covered != range.end) {
        return UserError("{} lacks the page at {:#x}, which a later dump says it has", name,
                         covered.value);
      }
    }
    return {};
  }

  const std::vector<std::string>& generations_;
  std::set<std::string> files_;  // names stay where they are
  const std::string* open_name_ = nullptr;
  Fd open_;
};

std::string NameOf(const criu::Vma& vma) {
  if ((vma.status & criu::kVmaHeap) != 0) return "[heap]";
  if ((vma.status & criu::kVmaStack) != 0) return "[stack]";
  if ((vma.status & criu::kVmaVdso) != 0) return "[vdso]";
  if ((vma.status & criu::kVmaVvar) != 0) return "[vvar]";
  if ((vma.status & criu::kVmaVsyscall) != 0) return "[vsyscall]";
  return "";
}

ManifestVma Describe(const criu::Vma& vma) {
  ManifestVma entry;
  entry.range = vma.range;
  entry.prot = static_cast<int>(vma.prot & 7);
  constexpr const char* kNames[] = {"rd", "wr", "ex"};
  for (int bit = 0; bit < 3; ++bit) {
    if ((entry.prot >> bit & 1) != 0) entry.flags.emplace_back(kNames[bit]);
  }
  entry.name = NameOf(vma);
  return entry;
}

Bytes PresentIn(const std::vector<ChainRun>& runs, VaddrRange range) {
  Bytes sum;
  auto run = std::ranges::partition_point(
      runs, [&](const ChainRun& r) { return r.entry.range.end <= range.begin; });
  for (; run != runs.end() && run->entry.range.begin < range.end; ++run) {
    if (run->file != nullptr) sum += run->entry.range.Intersect(range).size();
  }
  return sum;
}

class Importer {
 public:
  Importer(const ImportOptions& options, std::vector<std::string> generations, std::string out)
      : options_(options),
        generations_(std::move(generations)),
        out_(std::move(out)),
        pages_(generations_),
        criu_(CriuDirectory(out_)) {}

  // Fills the directory, which is empty; `user_data` may be.
  [[nodiscard]] Result<ImportReport> Run(const std::string& user_data);

 private:
  [[nodiscard]] const std::string& from() const { return generations_.front(); }
  [[nodiscard]] Result<ManifestTask> ImportTask(const criu::Task& task);
  [[nodiscard]] Result<std::vector<ManifestVma>> PlanTask(const criu::Task& task,
                                                          const std::vector<ChainRun>& runs) const;
  [[nodiscard]] Result<> AddToLayer(const criu::Task& task, const std::vector<ManifestVma>& vmas,
                                    const std::vector<ChainRun>& runs);
  // Goes through the pages; those inside a mapped VMA go to the layer.
  [[nodiscard]] Result<> WritePages(criu::PageStreamId id, const std::vector<ChainRun>& runs,
                                    const std::vector<ManifestVma>& vmas);
  [[nodiscard]] Result<> WritePart(criu::PageStreamId id, const ChainRun& run, VaddrRange part,
                                   bool to_layer);
  [[nodiscard]] Result<> CopyMetadata();
  [[nodiscard]] Result<> WriteManifestFile(std::vector<ManifestTask> tasks,
                                           const std::string& user_data);

  const ImportOptions& options_;
  const std::vector<std::string> generations_;
  const std::string out_;
  ChainPages pages_;
  criu::PageImageWriter criu_;
  std::optional<DeltaWriter> layer_;
  ImportReport report_;
  Bytes done_;
  Bytes total_;
};

Result<std::vector<ManifestVma>> Importer::PlanTask(const criu::Task& task,
                                                    const std::vector<ChainRun>& runs) const {
  UNMOOR_ASSIGN(const std::vector<criu::Vma> vmas, criu::ReadVmas(from(), task.vpid));
  const auto is_guard = [](const criu::Vma& vma) { return (vma.status & criu::kVmaGuard) != 0; };
  std::vector<ManifestVma> result;
  for (const criu::Vma& vma : vmas) {
    if (is_guard(vma)) continue;
    ManifestVma entry = Describe(vma);
    entry.data = PresentIn(runs, vma.range);
    const bool guarded = std::ranges::any_of(
        vmas, [&](const criu::Vma& v) { return is_guard(v) && v.range.Overlaps(vma.range); });
    const bool mapped = criu::IsTakeable(vma) && !guarded && entry.data >= kLeastMapped;
    entry.kind = mapped                  ? VmaKind::kMapped
                 : entry.data > Bytes(0) ? VmaKind::kCriu
                                         : VmaKind::kNone;
    result.push_back(std::move(entry));
  }
  return result;
}

Result<> Importer::AddToLayer(const criu::Task& task, const std::vector<ManifestVma>& vmas,
                              const std::vector<ChainRun>& runs) {
  const PageSource now = [&](Vaddr at, std::span<std::byte> page) {
    std::memset(page.data(), 0, page.size());
    const auto run = std::ranges::partition_point(
        runs, [&](const ChainRun& r) { return r.entry.range.end <= at; });
    if (run == runs.end() || !run->entry.range.Contains(at) || run->file == nullptr) return true;
    return pages_.Read(*run, at - run->entry.range.begin, page).has_value();
  };
  std::vector<DeltaVma> mapped;
  for (const ManifestVma& vma : vmas) {
    if (vma.kind != VmaKind::kMapped) continue;
    DeltaVma item{vma.range, {}};
    if (task.parent != 0) {
      UNMOOR_ASSIGN(item.base, layer_->FindShared(task.parent, vma.range));
      if (item.base && !layer_->IsMostlyShared(*item.base, vma.data, now)) item.base.reset();
    }
    mapped.push_back(std::move(item));
  }
  return layer_->AddTask(task.vpid, std::move(mapped));
}

Result<> Importer::WritePart(criu::PageStreamId id, const ChainRun& run, VaddrRange part,
                             bool to_layer) {
  const uint32_t flags = run.entry.flags & ~criu::kPageInParent;
  if (run.file == nullptr) {
    return to_layer ? Result<>() : criu_.Absent(id, part, flags);
  }
  std::vector<std::byte> buffer;
  for (Vaddr at = part.begin; at < part.end; at = at + Bytes(buffer.size())) {
    buffer.resize(std::min<uint64_t>(kChunk, (part.end - at).value));
    UNMOOR_TRY(pages_.Read(run, at - run.entry.range.begin, buffer));
    if (to_layer) {
      UNMOOR_TRY(layer_->Write(static_cast<uint32_t>(id.id), at, buffer));
    } else {
      UNMOOR_TRY(criu_.Pages(id, at, flags, buffer));
    }
    done_ += Bytes(buffer.size());
    if (options_.progress) options_.progress(done_, std::max(done_, total_));
  }
  return {};
}

Result<> Importer::WritePages(criu::PageStreamId id, const std::vector<ChainRun>& runs,
                              const std::vector<ManifestVma>& vmas) {
  UNMOOR_TRY(criu_.Open(id));
  auto vma = vmas.begin();
  for (const ChainRun& run : runs) {
    for (Vaddr at = run.entry.range.begin; at < run.entry.range.end;) {
      while (vma != vmas.end() && vma->range.end <= at) ++vma;
      Vaddr end = run.entry.range.end;
      bool mapped = false;
      if (vma != vmas.end()) {
        const bool inside = vma->range.begin <= at;
        mapped = inside && vma->kind == VmaKind::kMapped;
        end = std::min(end, inside ? vma->range.end : vma->range.begin);
      }
      UNMOOR_TRY(WritePart(id, run, {at, end}, mapped));
      at = end;
    }
  }
  if (id.kind != criu::StreamKind::kTask || criu_.HasEntries(id) || runs.empty()) return {};
  // CRIU refuses a task without any pages of its own: give it one that also is in the layer.
  const auto first =
      std::ranges::find_if(runs, [](const ChainRun& r) { return r.file != nullptr; });
  if (first == runs.end()) return {};
  const Vaddr at = first->entry.range.begin;
  return WritePart(id, *first, {at, at + Bytes(kPageSize)}, false);
}

Result<ManifestTask> Importer::ImportTask(const criu::Task& task) {
  ManifestTask entry;
  entry.vpid = task.vpid;
  entry.ppid = task.parent;
  entry.comm = task.name;
  entry.state = task.state_name();
  if (!task.has_memory()) return entry;
  const criu::PageStreamId id{criu::StreamKind::kTask, task.vpid};
  UNMOOR_ASSIGN(const std::vector<ChainRun> runs, pages_.Resolve(id));
  UNMOOR_ASSIGN(entry.vmas, PlanTask(task, runs));
  UNMOOR_TRY(AddToLayer(task, entry.vmas, runs));
  UNMOOR_TRY(WritePages(id, runs, entry.vmas));
  return entry;
}

// Everything but pages. Copied: who uses criu writes its files again in place.
Result<> Importer::CopyMetadata() {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(from()));
  for (const std::string& name : names) {
    if (IsPages(name) || name == "parent") continue;
    const std::string path = from() + "/" + name;
    UNMOOR_ASSIGN(const struct stat info, Stat(path));
    const auto stream = criu::ParsePagemapName(name);
    if (!stream) {
      if (S_ISREG(info.st_mode))
        UNMOOR_TRY(CopyRegularFile(path, CriuDirectory(out_) + "/" + name));
    } else if (stream->kind != criu::StreamKind::kTask) {
      UNMOOR_ASSIGN(const std::vector<ChainRun> runs, pages_.Resolve(*stream));
      UNMOOR_TRY(WritePages(*stream, runs, {}));
    }
  }
  return {};
}

Result<> Importer::WriteManifestFile(std::vector<ManifestTask> tasks,
                                     const std::string& user_data) {
  Manifest manifest;
  UNMOOR_ASSIGN(manifest.checkpoint_id, NewId());
  UNMOOR_ASSIGN(const struct stat info, Stat(from() + "/inventory.img"));
  manifest.created = Nanos(info.st_mtim.tv_sec * 1'000'000'000 + info.st_mtim.tv_nsec);
  manifest.tool_version = options_.tool_version;
  manifest.root_vpid = tasks.front().vpid;
  manifest.tasks = std::move(tasks);
  UNMOOR_ASSIGN(const std::optional<LayerInfo> layer, layer_->Finish(false));
  if (layer) UNMOOR_TRY(layer_->Describe(manifest, *layer, out_));
  report_.layer_bytes = layer ? layer->data_bytes : Bytes(0);
  manifest.written = report_.layer_bytes;
  if (!user_data.empty()) {
    UNMOOR_ASSIGN(manifest.user_data, WriteUserData(out_, user_data));
  }
  return WriteManifest(out_, manifest);
}

Result<ImportReport> Importer::Run(const std::string& user_data) {
  UNMOOR_TRY(MakeDirectory(CriuDirectory(out_), 0700));
  UNMOOR_TRY(MakeDirectory(LayersDirectory(out_), 0700));
  UNMOOR_ASSIGN(const std::vector<criu::Task> tasks, criu::ReadTasks(from()));
  UNMOOR_ASSIGN(const std::string id, NewId());
  layer_.emplace(LayersDirectory(out_), id, std::span<const LayerReader>(), tasks.size() > 1);
  for (const std::string& directory : generations_) {
    for (const std::string& name : ListDirectory(directory).value_or(std::vector<std::string>{})) {
      const auto size = IsPages(name) ? Stat(directory + "/" + name) : Result<struct stat>();
      if (size) total_ += Bytes(static_cast<uint64_t>(size->st_size));
    }
  }
  std::vector<ManifestTask> entries;
  for (const criu::Task& task : tasks) {
    UNMOOR_ASSIGN(ManifestTask entry, ImportTask(task));
    entries.push_back(std::move(entry));
  }
  UNMOOR_TRY(CopyMetadata());
  UNMOOR_TRY(FaultPoint("import.pages_written"));
  UNMOOR_TRY(criu_.Finish(false));
  UNMOOR_TRY(WriteManifestFile(std::move(entries), user_data));
  report_.tasks = tasks.size();
  report_.generations = generations_.size();
  report_.criu_bytes = criu_.written();
  return std::move(report_);
}

Result<std::vector<std::string>> OpenChain(const std::string& directory) {
  if (!IsStockCriuDirectory(directory)) {
    UNMOOR_TRY(ListDirectory(directory));
    return UserError("{} is not what criu dump writes: it has no inventory.img", directory);
  }
  return FindGenerations(directory);
}

Result<ImportReport> ImportInto(const ImportOptions& options,
                                const std::vector<std::string>& generations, const std::string& out,
                                const std::string& user_data) {
  UNMOOR_ASSIGN(Publisher publisher, Publisher::Begin(out));
  UNMOOR_ASSIGN(ImportReport report,
                Importer(options, generations, publisher.path()).Run(user_data));
  UNMOOR_TRY(publisher.Publish());
  report.directory = publisher.target();
  return report;
}

// What tells whether a chain is still what was imported: every file's name, size and time.
Result<std::string> Fingerprint(const std::vector<std::string>& generations) {
  std::string text = "import of stock criu directories\n";
  for (const std::string& directory : generations) {
    UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(directory));
    for (const std::string& name : names) {
      UNMOOR_ASSIGN(const struct stat info, Stat(directory + "/" + name));
      if (!S_ISREG(info.st_mode) || !name.ends_with(".img")) continue;
      text += fmt::format("{}/{} {} {} {}.{:09}\n", directory, name, info.st_ino, info.st_size,
                          info.st_mtim.tv_sec, info.st_mtim.tv_nsec);
    }
  }
  return text;
}

}  // namespace

bool IsStockCriuDirectory(const std::string& directory) {
  return Exists(directory + "/inventory.img") && !Exists(ManifestPath(directory));
}

Result<ImportReport> Import(const ImportOptions& options) {
  UNMOOR_ASSIGN(const std::vector<std::string> generations, OpenChain(options.directory));
  if (const auto there = ListDirectory(options.out); there && !there->empty()) {
    return UserError("{} is not empty; give a new directory", options.out);
  }
  return ImportInto(options, generations, options.out, {});
}

Result<ImportedBeside> ImportBeside(const ImportOptions& options) {
  UNMOOR_ASSIGN(const std::vector<std::string> generations, OpenChain(options.directory));
  UNMOOR_ASSIGN(const std::string fingerprint, Fingerprint(generations));
  const std::string place = generations.front() + ".unmoor-import";
  if (const auto manifest = ReadManifest(place); manifest && manifest->user_data) {
    const auto made_from = ReadUserData(place, *manifest->user_data);
    if (made_from && *made_from == fingerprint) return ImportedBeside{place, false};
  }
  UNMOOR_ASSIGN(const ImportReport report, ImportInto(options, generations, place, fingerprint));
  return ImportedBeside{report.directory, true};
}

}  // namespace unmoor
