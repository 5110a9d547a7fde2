// See rewrite.h. Recipe: docs/format.md, "CRIU metadata".
#include "criu/rewrite.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <set>

#include "criu/image_codec.h"
#include "criu/metadata.h"
#include "criu/mm_image.h"
#include "criu/page_images.h"
#include "criu/page_runs.h"
#include "os/file.h"
#include "proto/image.pb.h"

namespace unmoor::criu {
namespace {

constexpr uint32_t kFileTypeRegular = 1;

// files.img with our own entries added. CRIU's entries stay the bytes they were.
class FileTable {
 public:
  [[nodiscard]] static Result<FileTable> Read(const std::string& path) {
    FileTable table;
    UNMOOR_ASSIGN(const RawImage image, RawImage::Read(path, ImageType::kFiles));
    for (const RawImage::Message& raw : image.messages()) {
      UNMOOR_ASSIGN(const proto::FileEntryId entry, ParseMessage<proto::FileEntryId>(image, raw));
      table.last_id_ = std::max(table.last_id_, entry.id());
      table.builder_.Append(raw.bytes);
    }
    table.path_ = path;
    return table;
  }

  // A new id for the layer's file.
  [[nodiscard]] Result<uint32_t> Add(uint32_t layer) {
    if (last_id_ >= UINT32_MAX - 1) return UserError("{}: no file id is left", path_);
    proto::FileEntry entry;
    entry.set_type(kFileTypeRegular);
    entry.set_id(++last_id_);
    proto::RegFileEntry& reg = *entry.mutable_reg();
    reg.set_id(entry.id());
    reg.set_flags(O_RDONLY | O_LARGEFILE);
    reg.set_pos(0);
    proto::FownEntry& owner = *reg.mutable_fown();
    owner.set_uid(0);
    owner.set_euid(0);
    owner.set_signum(0);
    owner.set_pid_type(0);
    owner.set_pid(0);
    reg.set_name("/" + LayerKey(layer));
    reg.set_mnt_id(-1);
    builder_.Append(entry.SerializeAsString());
    return entry.id();
  }

  [[nodiscard]] const std::string& data() const { return builder_.data(); }

 private:
  FileTable() = default;
  std::string path_;
  ImageBuilder builder_{ImageType::kFiles};
  uint32_t last_id_ = 0;
};

void MapFromFile(proto::VmaEntry& vma, uint32_t file_id, FileOffset offset) {
  vma.set_status((vma.status() & ~kVmaAnonPrivate) | kVmaFilePrivate);
  vma.set_flags(vma.flags() & ~static_cast<uint32_t>(MAP_ANONYMOUS));
  vma.set_shmid(file_id);
  vma.set_pgoff(offset.value);
  vma.set_fdflags(0);
}

// The heap's mark is lost with its name in the map list; the kernel names what lies there.
void MakeAnonymous(proto::VmaEntry& vma, const proto::MmEntry& mm) {
  vma.set_status((vma.status() & ~kVmaFilePrivate) | kVmaAnonPrivate);
  if (vma.start() <= mm.brk() && vma.end() >= mm.start_brk()) {
    vma.set_status(vma.status() | kVmaHeap);
  }
  vma.set_flags(vma.flags() | MAP_ANONYMOUS);
  vma.set_shmid(0);
  vma.set_pgoff(0);
  vma.clear_fdflags();
}

std::string MmName(uint32_t vpid) {
  return fmt::format("mm-{}.img", vpid);
}

Result<> WriteMm(const MmImage& mm, const std::string& path) {
  ImageBuilder builder(ImageType::kMm);
  builder.Append(mm.entry.SerializeAsString());
  return WriteFile(path, builder.data(), 0600);
}

// files.img without these entries.
Result<> ForgetFiles(const std::string& path, const std::set<uint64_t>& ids) {
  ImageBuilder builder(ImageType::kFiles);
  {
    UNMOOR_ASSIGN(const RawImage image, RawImage::Read(path, ImageType::kFiles));
    for (const RawImage::Message& raw : image.messages()) {
      UNMOOR_ASSIGN(const proto::FileEntryId entry, ParseMessage<proto::FileEntryId>(image, raw));
      if (entry.type() != kFileTypeRegular || !ids.contains(entry.id())) builder.Append(raw.bytes);
    }
  }
  return WriteFile(path, builder.data(), 0600);
}

Result<> CheckMapping(const DirectMapping& mapping, const std::string& path) {
  if (mapping.range.empty() ||
      (mapping.range.begin.value | mapping.range.end.value | mapping.offset.value) % kPageSize !=
          0) {
    return UserError("{}: the range {} at offset {:#x} of a page image is not made of pages", path,
                     mapping.range, mapping.offset.value);
  }
  return {};
}

// Turns the VMAs of one task. The mappings are ascending, and so are CRIU's VMAs but for guard
// entries, which come last.
Result<> MapTask(MmImage& mm, const TaskMapping& task, FileTable& files) {
  std::map<uint32_t, uint32_t> file_ids;  // by layer
  auto* const vmas = mm.entry.mutable_vmas();
  int at = 0;
  Vaddr last_end;
  for (const DirectMapping& mapping : task.mappings) {
    UNMOOR_TRY(CheckMapping(mapping, mm.path));
    if (mapping.range.begin < last_end) {
      return UserError("{}: the range {} comes after one that ends at {}", mm.path, mapping.range,
                       last_end);
    }
    last_end = mapping.range.end;
    if (!file_ids.contains(mapping.layer)) {
      UNMOOR_ASSIGN(file_ids[mapping.layer], files.Add(mapping.layer));
    }
    while (at < vmas->size() && vmas->at(at).end() <= mapping.range.begin.value) ++at;
    Vaddr covered = mapping.range.begin;
    for (; at < vmas->size() && covered < mapping.range.end; ++at) {
      proto::VmaEntry& entry = vmas->at(at);
      const Vma vma = FromEntry(entry);
      if (vma.range.begin != covered || vma.range.end > mapping.range.end) break;
      if (const std::string_view why = WhyNotTakeable(vma); !why.empty()) {
        return UserError("{}: VMA {} cannot be mapped from a page image: {}", mm.path, vma.range,
                         why);
      }
      MapFromFile(entry, file_ids[mapping.layer],
                  mapping.offset + (vma.range.begin - mapping.range.begin));
      covered = vma.range.end;
    }
    if (covered != mapping.range.end) {
      return UserError(
          "{}: the range {} to be mapped is not made of whole VMAs (nothing fits at {}); the page "
          "image and CRIU's metadata are not of one checkpoint",
          mm.path, mapping.range, covered);
    }
  }
  return {};
}

// Runs one after the other into one file; most of a delta's are single pages, so many are read
// before they are written.
class PagesCopy {
 public:
  PagesCopy(int to, const std::string& to_path) : to_(to), to_path_(to_path), buffer_(kMost) {}

  [[nodiscard]] Result<> Add(const PageRun& run) {
    FileOffset from = run.entry.pages;
    for (uint64_t left = run.entry.range.size().value; left > 0;) {
      const auto part = std::span(buffer_).subspan(filled_, std::min(left, kMost - filled_));
      UNMOOR_TRY(ReadExactlyAt(run.fd, part, from, *run.path));
      from = from + Bytes(part.size());
      filled_ += part.size();
      left -= part.size();
      if (filled_ == kMost) UNMOOR_TRY(Flush());
    }
    return {};
  }
  [[nodiscard]] Result<> Flush() {
    UNMOOR_TRY(WriteExactlyAt(to_, std::span(buffer_).first(filled_), at_, to_path_));
    at_ = at_ + Bytes(filled_);
    filled_ = 0;
    return {};
  }

 private:
  static constexpr uint64_t kMost = uint64_t{256} << 10;
  int to_;
  const std::string& to_path_;
  std::vector<std::byte> buffer_;
  size_t filled_ = 0;
  FileOffset at_;
};

// pagemap-<vpid>.img and its pages image in the view; returns their names.
Result<std::vector<std::string>> MergePages(const std::string& criu_directory,
                                            const std::string& view_directory,
                                            const TaskMapping& task,
                                            std::span<const LayerFile> layers) {
  const PageStreamId id{StreamKind::kTask, task.vpid};
  UNMOOR_ASSIGN(const Pagemap pagemap, ReadPagemap(criu_directory, id));
  const std::string pages_name = PagesName(pagemap.pages_id);
  const std::string from_path = criu_directory + "/" + pages_name;
  UNMOOR_ASSIGN(const Fd from, OpenRegularFile(from_path));
  std::vector<PageRun> loads;
  for (const DirectMapping& load : task.loads) {
    const LayerFile& file = layers[load.layer];
    loads.push_back({{load.range, kPagePresent, load.offset}, file.fd, &file.path});
  }
  const std::vector<PageRun> runs = MergeRuns(RunsOf(pagemap, from.get(), from_path), loads);

  const std::string to_path = view_directory + "/" + pages_name;
  UNMOOR_ASSIGN(const Fd to, OpenFile(to_path, O_WRONLY | O_CREAT | O_EXCL, 0600));
  PagesCopy copy(to.get(), to_path);
  std::vector<PagemapEntry> entries;
  for (const PageRun& run : runs) {
    entries.push_back(run.entry);
    if (run.fd >= 0) UNMOOR_TRY(copy.Add(run));
  }
  UNMOOR_TRY(copy.Flush());
  const std::string name = PagemapName(id);
  UNMOOR_TRY(
      WriteFile(view_directory + "/" + name, EncodePagemap(pagemap.pages_id, entries), 0600));
  return std::vector<std::string>{name, pages_name};
}

std::vector<PagemapEntry> MarkLazy(std::span<const PagemapEntry> entries,
                                   std::span<const DirectMapping> lazy) {
  std::vector<PagemapEntry> marked;
  auto next = lazy.begin();
  for (const PagemapEntry& entry : entries) {
    for (Vaddr at = entry.range.begin; at < entry.range.end;) {
      while (next != lazy.end() && next->range.end <= at) ++next;
      const bool inside = next != lazy.end() && next->range.Contains(at);
      Vaddr end = entry.range.end;
      if (next != lazy.end()) end = std::min(end, inside ? next->range.end : next->range.begin);
      const uint32_t flags = inside ? entry.flags | kPageLazy : entry.flags & ~kPageLazy;
      marked.push_back({{at, end}, flags, {}});
      at = end;
    }
  }
  return marked;
}

// Of what is in CRIU's directory and not in the view.
Result<> LinkTheRest(const std::string& criu_directory, const std::string& view_directory,
                     const std::set<std::string>& written) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(criu_directory));
  for (const std::string& name : names) {
    // What criu writes itself during the restore must not go through a link.
    if (written.contains(name) || name == "stats-restore") continue;
    UNMOOR_TRY(SymbolicLink(criu_directory + "/" + name, view_directory + "/" + name));
  }
  return {};
}

}  // namespace

std::string LayerKey(uint32_t layer) {
  return fmt::format("unmoor-layer-{}", layer);
}

std::string InheritFdArgument(int fd, uint32_t layer) {
  return fmt::format("fd[{}]:{}", fd, LayerKey(layer));
}

Result<> RewriteForDirectMap(const std::string& criu_directory, const std::string& view_directory,
                             std::span<const TaskMapping> tasks,
                             std::span<const LayerFile> layers) {
  UNMOOR_CHECK(criu_directory.starts_with('/'));
  UNMOOR_ASSIGN(FileTable files, FileTable::Read(criu_directory + "/files.img"));
  UNMOOR_ASSIGN(const std::vector<std::string> present, ListDirectory(view_directory));
  std::set<std::string> written(present.begin(), present.end());
  for (const TaskMapping& task : tasks) {
    if (task.mappings.empty()) continue;
    UNMOOR_ASSIGN(MmImage mm, MmImage::Read(criu_directory, task.vpid));
    UNMOOR_TRY(MapTask(mm, task, files));
    const std::string name = MmName(task.vpid);
    if (!written.insert(name).second) {
      return UserError("task {} is to be mapped twice", task.vpid);
    }
    UNMOOR_TRY(WriteMm(mm, view_directory + "/" + name));
    if (task.loads.empty()) continue;
    UNMOOR_ASSIGN(const std::vector<std::string> merged,
                  MergePages(criu_directory, view_directory, task, layers));
    written.insert(merged.begin(), merged.end());
  }
  UNMOOR_TRY(WriteFile(view_directory + "/files.img", files.data(), 0600));
  written.insert("files.img");
  return LinkTheRest(criu_directory, view_directory, written);
}

Result<> RewriteForLazyPages(const std::string& criu_directory, const std::string& view_directory,
                             std::span<const TaskMapping> tasks) {
  UNMOOR_CHECK(criu_directory.starts_with('/'));
  UNMOOR_ASSIGN(const std::vector<std::string> present, ListDirectory(view_directory));
  std::set<std::string> written(present.begin(), present.end());
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(criu_directory));
  for (const std::string& name : names) {
    const auto id = ParsePagemapName(name);
    if (!id || id->kind != StreamKind::kTask) continue;
    UNMOOR_ASSIGN(const Pagemap pagemap, ReadPagemap(criu_directory, *id));
    const auto task = std::ranges::find(tasks, id->id, &TaskMapping::vpid);
    const auto lazy = task == tasks.end() ? std::span<const DirectMapping>() : task->mappings;
    const std::string image = EncodePagemap(pagemap.pages_id, MarkLazy(pagemap.entries, lazy));
    UNMOOR_TRY(WriteFile(view_directory + "/" + name, image, 0600));
    written.insert(name);
  }
  return LinkTheRest(criu_directory, view_directory, written);
}

Result<> MakeAnonymousAgain(const std::string& criu_directory, std::span<const MappedTask> tasks) {
  std::set<uint64_t> files;
  std::set<uint64_t> needed;
  for (const MappedTask& task : tasks) {
    UNMOOR_ASSIGN(MmImage mm, MmImage::Read(criu_directory, task.vpid));
    for (proto::VmaEntry& entry : *mm.entry.mutable_vmas()) {
      const Vma vma = FromEntry(entry);
      const auto range = std::ranges::partition_point(
          task.ranges, [&](VaddrRange r) { return r.end <= vma.range.begin; });
      const bool taken = range != task.ranges.end() && range->Contains(vma.range);
      const bool maps = (vma.status & kVmaFilePrivate) != 0;
      if (!taken && (maps || (vma.status & kVmaFileShared) != 0)) needed.insert(vma.shmid);
      if (!taken || !maps) continue;
      files.insert(vma.shmid);
      MakeAnonymous(entry, mm.entry);
    }
    UNMOOR_TRY(WriteMm(mm, mm.path));
  }
  std::erase_if(files, [&](uint64_t id) { return needed.contains(id); });
  return files.empty() ? Result<>() : ForgetFiles(criu_directory + "/files.img", files);
}

}  // namespace unmoor::criu
