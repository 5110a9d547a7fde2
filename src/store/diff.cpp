// See diff.h.
#include "store/diff.h"

#include <fcntl.h>

#include <algorithm>
#include <cstring>

#include "base/zero.h"
#include "criu/page_runs.h"
#include "image/directory_lock.h"
#include "image/layout.h"
#include "os/file.h"
#include "store/stored_image.h"

namespace unmoor {
namespace {

constexpr uint64_t kChunk = uint64_t{1} << 20;

// One of the two images, with all pages of the task that is looked at.
class Side {
 public:
  explicit Side(StoredImage image) : image_(std::move(image)) {}

  [[nodiscard]] const Manifest& manifest() const { return image_.manifest(); }
  [[nodiscard]] const ManifestTask* Find(uint32_t vpid) const {
    const auto task = std::ranges::find(manifest().tasks, vpid, &ManifestTask::vpid);
    return task == manifest().tasks.end() ? nullptr : &*task;
  }

  [[nodiscard]] Result<> Select(const ManifestTask* task) {
    runs_.clear();
    if (task == nullptr) return {};
    UNMOOR_ASSIGN(const std::vector<OverlayRun> layer, image_.LayerPages(*task));
    runs_ = image_.ToPageRuns(layer);
    const std::string directory = CriuDirectory(image_.directory());
    const criu::PageStreamId id{criu::StreamKind::kTask, task->vpid};
    if (!Exists(directory + "/" + criu::PagemapName(id))) return {};  // a zombie, or no process
    UNMOOR_ASSIGN(const criu::Pagemap pagemap, criu::ReadPagemap(directory, id));
    pages_path_ = directory + "/" + criu::PagesName(pagemap.pages_id);
    UNMOOR_ASSIGN(pages_, OpenRegularFile(pages_path_));
    runs_ = criu::MergeRuns(criu::RunsOf(pagemap, pages_.get(), pages_path_), runs_);
    std::erase_if(runs_, [](const criu::PageRun& run) { return run.fd < 0; });
    return {};
  }

  // The run at `at`, or the next one; null at the end.
  [[nodiscard]] const criu::PageRun* RunFrom(Vaddr at) const {
    const auto run = std::ranges::partition_point(
        runs_, [&](const criu::PageRun& r) { return r.entry.range.end <= at; });
    return run == runs_.end() ? nullptr : &*run;
  }
  // The layer's id, empty for CRIU's own pages.
  [[nodiscard]] std::string LayerOf(const criu::PageRun& run) const {
    for (const LayerReader& layer : image_.layers()) {
      if (run.path == &layer.pages_path()) return layer.id();
    }
    return {};
  }

 private:
  StoredImage image_;
  std::vector<criu::PageRun> runs_;
  std::string pages_path_;
  Fd pages_;
};

FileOffset OffsetIn(const criu::PageRun& run, Vaddr at) {
  return run.entry.pages + (at - run.entry.range.begin);
}

class Comparison {
 public:
  Comparison(Side& before, Side& after) : before_(before), after_(after) {}
  [[nodiscard]] Result<DiffReport> Run();

 private:
  [[nodiscard]] Result<> CompareTask(const ManifestTask* before, const ManifestTask* after);
  // Pages of `range` that differ.
  [[nodiscard]] Result<PageCount> CountChanged(VaddrRange range);
  [[nodiscard]] Result<PageCount> CountIn(VaddrRange range, const criu::PageRun* a,
                                          const criu::PageRun* b);

  Side& before_;
  Side& after_;
  DiffReport report_;
};

// `range` is within both runs, or where one of them is null the other side has no pages there.
Result<PageCount> Comparison::CountIn(VaddrRange range, const criu::PageRun* a,
                                      const criu::PageRun* b) {
  PageCount changed;
  if (a == nullptr && b == nullptr) return changed;
  if (a != nullptr && b != nullptr) {
    const std::string layer = before_.LayerOf(*a);
    const bool same_place = OffsetIn(*a, range.begin) == OffsetIn(*b, range.begin);
    if (!layer.empty() && same_place && layer == after_.LayerOf(*b)) return changed;
    report_.compared += range.size();
  }
  std::vector<std::byte> left;
  std::vector<std::byte> right;
  for (Vaddr at = range.begin; at < range.end;) {
    const uint64_t size = std::min<uint64_t>(kChunk, (range.end - at).value);
    left.assign(size, std::byte{0});
    right.assign(size, std::byte{0});
    if (a != nullptr) UNMOOR_TRY(ReadExactlyAt(a->fd, left, OffsetIn(*a, at), *a->path));
    if (b != nullptr) UNMOOR_TRY(ReadExactlyAt(b->fd, right, OffsetIn(*b, at), *b->path));
    for (size_t i = 0; i < size; i += kPageSize) {
      if (std::memcmp(&left[i], &right[i], kPageSize) != 0) ++changed.value;
    }
    at = at + Bytes(size);
  }
  return changed;
}

Result<PageCount> Comparison::CountChanged(VaddrRange range) {
  PageCount changed;
  for (Vaddr at = range.begin; at < range.end;) {
    // Up to the next place where either side begins or ends a run.
    Vaddr end = range.end;
    const auto at_here = [&](const Side& side) -> const criu::PageRun* {
      const criu::PageRun* const run = side.RunFrom(at);
      if (run == nullptr) return nullptr;
      const bool here = run->entry.range.begin <= at;
      end = std::min(end, here ? run->entry.range.end : run->entry.range.begin);
      return here ? run : nullptr;
    };
    const criu::PageRun* const a = at_here(before_);
    const criu::PageRun* const b = at_here(after_);
    UNMOOR_ASSIGN(const PageCount more, CountIn({at, end}, a, b));
    changed += more;
    at = end;
  }
  return changed;
}

Result<> Comparison::CompareTask(const ManifestTask* before, const ManifestTask* after) {
  UNMOOR_TRY(before_.Select(before));
  UNMOOR_TRY(after_.Select(after));
  TaskDifference task;
  task.vpid = before != nullptr ? before->vpid : after->vpid;
  task.comm = after != nullptr ? after->comm : before->comm;
  task.before = before != nullptr;
  task.after = after != nullptr;
  static const std::vector<ManifestVma> none;
  const auto& old_vmas = before != nullptr ? before->vmas : none;
  const auto& new_vmas = after != nullptr ? after->vmas : none;
  Vaddr counted;  // below it all pages have been looked at
  const auto add = [&](const ManifestVma* a, const ManifestVma* b) -> Result<> {
    VmaDifference vma;
    vma.name = b != nullptr ? b->name : a->name;
    if (a != nullptr) vma.before = a->range;
    if (b != nullptr) vma.after = b->range;
    VaddrRange all = a != nullptr ? a->range : b->range;
    if (b != nullptr) {
      all = {std::min(all.begin, b->range.begin), std::max(all.end, b->range.end)};
    }
    all.begin = std::max(all.begin, counted);
    counted = std::max(all.end, counted);
    UNMOOR_ASSIGN(vma.changed, CountChanged(all));
    report_.changed += ToBytes(vma.changed);
    if (vma.differs()) task.vmas.push_back(std::move(vma));
    return {};
  };
  auto old_vma = old_vmas.begin();
  for (const ManifestVma& vma : new_vmas) {
    while (old_vma != old_vmas.end() && old_vma->range.end <= vma.range.begin) {
      UNMOOR_TRY(add(&*old_vma++, nullptr));
    }
    // Split or joined VMAs: the first that overlaps is it, the rest stand alone.
    const bool same = old_vma != old_vmas.end() && old_vma->range.Overlaps(vma.range);
    UNMOOR_TRY(add(same ? &*old_vma++ : nullptr, &vma));
  }
  while (old_vma != old_vmas.end()) UNMOOR_TRY(add(&*old_vma++, nullptr));
  if (!task.vmas.empty() || task.before != task.after) report_.tasks.push_back(std::move(task));
  return {};
}

Bytes PagesOf(const Manifest& manifest) {
  Bytes sum;
  for (const ManifestTask& task : manifest.tasks) {
    for (const ManifestVma& vma : task.vmas) sum += vma.data;
  }
  return sum;
}

Result<DiffReport> Comparison::Run() {
  report_.pages_before = PagesOf(before_.manifest());
  report_.pages_after = PagesOf(after_.manifest());
  for (const ManifestTask& task : before_.manifest().tasks) {
    UNMOOR_TRY(CompareTask(&task, after_.Find(task.vpid)));
  }
  for (const ManifestTask& task : after_.manifest().tasks) {
    if (before_.Find(task.vpid) == nullptr) UNMOOR_TRY(CompareTask(nullptr, &task));
  }
  return std::move(report_);
}

}  // namespace

Result<DiffReport> Diff(const std::string& before, const std::string& after) {
  UNMOOR_ASSIGN(const DirectoryLock old_lock, DirectoryLock::Take(before, LockUse::kRead));
  UNMOOR_ASSIGN(const DirectoryLock new_lock, DirectoryLock::Take(after, LockUse::kRead));
  UNMOOR_ASSIGN(StoredImage old_image, StoredImage::Open(before));
  UNMOOR_ASSIGN(StoredImage new_image, StoredImage::Open(after));
  Side old_side(std::move(old_image));
  Side new_side(std::move(new_image));
  return Comparison(old_side, new_side).Run();
}

}  // namespace unmoor
