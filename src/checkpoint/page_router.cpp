// See page_router.h.
#include "checkpoint/page_router.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "agent/page_image.h"
#include "base/fault_point.h"
#include "image/layout.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/remote_memory.h"

namespace unmoor {
namespace {

constexpr uint64_t kChunk = criu::PageServer::kChunk.value;

// Whether so much differs from the parent that the VMA is better written in full: a delta's pages
// are copied at restore instead of mapped. Told from a sample, since the answer is needed before
// the first page comes; right or wrong, it decides about cost only. Nobody who did not ask for a
// delta shall find a slower restore: then a few megabytes are too much.
bool IsMostlyChanged(Pid pid, const Parent& parent, const ParentBase& base, bool asked_for) {
  constexpr uint64_t kSamples = 128;
  constexpr uint64_t kUnnoticed = uint64_t{4} << 20;
  constexpr uint64_t kEnough = uint64_t{64} << 20;  // less is copied in no time
  if (base.pages.data.value < (asked_for ? kEnough : kUnnoticed)) return false;
  uint64_t changed = 0;
  auto run = base.pages.all.begin();
  uint64_t before = 0;  // bytes in the runs before `run`
  for (uint64_t i = 0; i < kSamples; ++i) {
    const uint64_t at = AlignDown(base.pages.data.value / kSamples * i, kPageSize);
    while (at - before >= run->range.size().value) before += (run++)->range.size().value;
    const Vaddr page = run->range.begin + Bytes(at - before);
    std::array<std::byte, kPageSize> now;
    std::array<std::byte, kPageSize> then;
    if (!ReadMemory(pid, page, now)) return false;
    if (!parent.Read(base, {page, page + Bytes(kPageSize)}, then)) return false;
    if (now != then) ++changed;
  }
  if (!asked_for) return base.pages.data.value / kSamples * changed > kUnnoticed;
  return changed * 4 > kSamples;
}

}  // namespace

Result<> PageRouter::Keep(Result<> result) {
  if (!result && !first_error_) first_error_ = result.error();
  return result;
}

Result<> PageRouter::Open(criu::PageStreamId id) {
  UNMOOR_TRY(Keep(page_images_.Open(id)));
  if (id.kind != criu::StreamKind::kTask) return {};
  return Keep(OpenTask(static_cast<uint32_t>(id.id)));
}

// CRIU names a task by its id in its own PID namespace.
Result<Pid> PageRouter::FindTask(uint32_t vpid) {
  if (pids_.empty()) {
    UNMOOR_ASSIGN(const std::vector<Pid> tree, ReadTree(options_.root));
    for (const Pid pid : tree) {
      const auto info = ReadProcess(pid);
      if (!info) continue;
      pids_.emplace(static_cast<uint32_t>(info->ns_pids.empty() ? pid.value : info->ns_pids.back()),
                    pid);
    }
  }
  const auto found = pids_.find(vpid);
  if (found == pids_.end()) {
    return MachineError("CRIU sends pages of task {}, which is not below process {}", vpid,
                        options_.root.value);
  }
  return found->second;
}

Result<> PageRouter::OpenTask(uint32_t vpid) {
  UNMOOR_TRY(FaultPoint("dump.open"));
  UNMOOR_ASSIGN(const Pid pid, FindTask(vpid));
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadSmaps(pid));
  // The remap was finished before; what appeared since would make the checkpoint depend on an
  // image.
  if (const auto image = std::ranges::find_if(vmas, MapsPageImage); image != vmas.end()) {
    return MachineError("process {} maps {} at {} again; 'unmoor wait -t {}', then dump once more",
                        pid.value, image->name, image->range, pid.value);
  }
  RoutedTask task{pid, PlanTask(vmas, options_.plan), {}, {}, {}};
  UNMOOR_ASSIGN(const Fd pagemap, OpenFile(fmt::format("/proc/{}/pagemap", pid.value), O_RDONLY));
  for (PlannedVma& item : task.plan) {
    if (!item.mapped || !HasGuardPages(pagemap.get(), item.vma.range)) continue;
    item.mapped = false;
    item.why = "has guard pages";
  }
  task.saved.resize(task.plan.size());
  task.bases.resize(task.plan.size());
  for (size_t i = 0; options_.parent != nullptr && i < task.plan.size(); ++i) {
    if (!task.plan[i].mapped) continue;
    task.bases[i] = options_.parent->Find(vpid, task.plan[i].vma);
    if (task.bases[i] && IsMostlyChanged(pid, *options_.parent, *task.bases[i], options_.parent_asked_for)) {
      task.bases[i].reset();
    }
  }
  const std::vector<VaddrRange> mapped = MappedRanges(task.plan);
  if (!mapped.empty()) {
    if (!writer_) {
      UNMOOR_ASSIGN(writer_, LayerWriter::Create(
                                 options_.layers_directory, options_.layer_id, WriteBack::kLater,
                                 options_.parent != nullptr ? ZeroPages::kKeep : ZeroPages::kHole));
    }
    UNMOOR_TRY(writer_->AddTask(vpid, mapped));
  }
  cursor_ = 0;
  if (!tasks_.emplace(vpid, std::move(task)).second) {
    return MachineError("CRIU sends the pages of task {} twice", vpid);
  }
  return {};
}

Result<> PageRouter::Pages(criu::PageStreamId id, Vaddr at, uint32_t flags,
                           std::span<const std::byte> data) {
  UNMOOR_TRY(Keep(FaultPoint("dump.pages")));
  received_ += Bytes(data.size());
  if (const Nanos now = MonotonicNow(); options_.progress && now - told_at_ > Nanos(100'000'000)) {
    told_at_ = now;
    options_.progress(received_);
  }
  return Keep(RoutePages(id, at, flags, data));
}

Result<> PageRouter::RoutePages(criu::PageStreamId id, Vaddr at, uint32_t flags,
                                std::span<const std::byte> data) {
  if (id.kind != criu::StreamKind::kTask) return page_images_.Pages(id, at, flags, data);
  const auto vpid = static_cast<uint32_t>(id.id);
  RoutedTask& task = tasks_.at(vpid);
  if (first_pages_.empty() || first_pages_.back().id != id) {
    const auto page = data.first(kPageSize);
    first_pages_.push_back({id, at, flags, {page.begin(), page.end()}});
  }
  while (!data.empty()) {
    while (cursor_ < task.plan.size() && task.plan[cursor_].vma.range.end <= at) ++cursor_;
    if (cursor_ == task.plan.size() || at < task.plan[cursor_].vma.range.begin) {
      return MachineError("CRIU sends a page at {} of task {}, where it has no memory", at, vpid);
    }
    const PlannedVma& item = task.plan[cursor_];
    UNMOOR_TRY(HideVanished(vpid, task, at));
    const uint64_t room = std::min<uint64_t>((item.vma.range.end - at).value, data.size());
    const auto part = data.first(room);
    if (item.mapped) {
      UNMOOR_TRY(WriteToLayer(vpid, task, cursor_, at, part));
    } else {
      UNMOOR_TRY(page_images_.Pages(id, at, flags, part));
    }
    task.saved[cursor_] += Bytes(room);
    data = data.subspan(room);
    at = at + Bytes(room);
    task.settled = at;
  }
  return {};
}

// Without a base a page is compared with zeros: in a delta's layer zeros count as pages.
Result<> PageRouter::WriteToLayer(uint32_t vpid, const RoutedTask& task, size_t vma, Vaddr at,
                                  std::span<const std::byte> data) {
  if (options_.parent == nullptr) return writer_->Write(vpid, at, data);
  parent_bytes_.resize(kChunk);
  while (!data.empty()) {
    const auto part = data.first(std::min<size_t>(data.size(), kChunk));
    const auto old = std::span(parent_bytes_).first(part.size());
    if (task.bases[vma]) {
      UNMOOR_TRY(options_.parent->Read(*task.bases[vma], {at, at + Bytes(part.size())}, old));
    } else {
      std::memset(old.data(), 0, old.size());
    }
    const auto same = [&](size_t i) { return std::memcmp(&part[i], &old[i], kPageSize) == 0; };
    for (size_t i = 0; i < part.size();) {
      const bool skip = same(i);
      size_t end = i + kPageSize;
      while (end < part.size() && same(end) == skip) end += kPageSize;
      if (!skip) UNMOOR_TRY(writer_->Write(vpid, at + Bytes(i), part.subspan(i, end - i)));
      i = end;
    }
    data = data.subspan(part.size());
    at = at + Bytes(part.size());
  }
  return {};
}

Result<> PageRouter::HideVanished(uint32_t vpid, RoutedTask& task, Vaddr end) {
  static const std::vector<std::byte> zeros(kChunk);
  const auto first = std::ranges::partition_point(
      task.plan, [&](const PlannedVma& item) { return item.vma.range.end <= task.settled; });
  for (auto i = static_cast<size_t>(first - task.plan.begin()); i < task.plan.size(); ++i) {
    if (task.plan[i].vma.range.begin >= end) break;
    if (!task.bases[i]) continue;
    const auto& runs = task.bases[i]->pages.all;
    auto run = std::ranges::partition_point(
        runs, [&](const OverlayRun& r) { return r.range.end <= task.settled; });
    for (; run != runs.end() && run->range.begin < end; ++run) {
      const VaddrRange hidden = run->range.Intersect({task.settled, end});
      for (Vaddr at = hidden.begin; at < hidden.end;) {
        const uint64_t size = std::min<uint64_t>((hidden.end - at).value, kChunk);
        UNMOOR_TRY(WriteToLayer(vpid, task, i, at, std::span(zeros).first(size)));
        at = at + Bytes(size);
      }
    }
  }
  task.settled = std::max(task.settled, end);
  return {};
}

Result<> PageRouter::Absent(criu::PageStreamId id, VaddrRange range, uint32_t flags) {
  return Keep(page_images_.Absent(id, range, flags));
}

Result<> PageRouter::Close() {
  return Keep(Finish());
}

Result<> PageRouter::Finish() {
  UNMOOR_TRY(FaultPoint("dump.close"));
  // CRIU refuses a task without any pages of its own: give it one that also is in the layer.
  for (const FirstPage& page : first_pages_) {
    if (page_images_.HasEntries(page.id)) continue;
    UNMOOR_TRY(page_images_.Pages(page.id, page.at, page.flags, page.data));
  }
  for (auto& [vpid, task] : tasks_) UNMOOR_TRY(HideVanished(vpid, task, Vaddr(kAddressLimit)));
  UNMOOR_TRY(page_images_.Finish(options_.sync));
  if (writer_) {
    UNMOOR_ASSIGN(layer_, writer_->Finish(options_.sync));
  }
  return {};
}

}  // namespace unmoor
