// See page_router.h.
#include "checkpoint/page_router.h"

#include <fcntl.h>

#include <algorithm>
#include <csignal>

#include "agent/page_image.h"
#include "base/fault_point.h"
#include "image/layout.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/remote_memory.h"

namespace unmoor {

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

// The task's memory as it is now, frozen.
Result<std::vector<PlannedVma>> PageRouter::Plan(uint32_t vpid, Pid pid) {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadSmaps(pid));
  MappedLayers layers;
  if (options_.still_mapped) {
    layers.find = [this](const VmaInfo& vma) { return options_.parent->LayerOf(vma); };
    layers.whole = options_.parent->MappedRanges(vpid);
  }
  for (const VmaInfo& vma : vmas) {
    if (vma.HasFlag("um")) {
      // What has not come yet is missing in the pagemap, so CRIU would not send it.
      must_be_remapped_ = true;
      return MachineError(
          "pages of process {} at {} may still have to come (a lazy restore, or another's "
          "userfaultfd); 'unmoor wait -t {}', then dump once more",
          pid.value, vma.range, pid.value);
    }
    if (!MapsPageImage(vma) || (layers.find && layers.find(vma))) continue;
    must_be_remapped_ = options_.still_mapped;
    // Without it the remap was finished before; what appeared since would make the checkpoint
    // depend on an image.
    return MachineError("process {} maps {} at {} again; 'unmoor wait -t {}', then dump once more",
                        pid.value, vma.name, vma.range, pid.value);
  }
  std::vector<PlannedVma> plan = PlanTask(vmas, options_.plan, layers);
  UNMOOR_ASSIGN(const Fd pagemap, OpenFile(fmt::format("/proc/{}/pagemap", pid.value), O_RDONLY));
  for (PlannedVma& item : plan) {
    if (item.mapped && HasGuardPages(pagemap.get(), item.vma.range)) {
      item.mapped = false;
      item.why = "has guard pages";
    }
    if (item.mapped || item.pieces.empty()) continue;
    must_be_remapped_ = true;
    return MachineError("process {} maps its image at {}, which {}", pid.value, item.vma.range,
                        item.why);
  }
  return plan;
}

// What the task had in the parent checkpoint; else, of a forked child, what its parent has. Memory
// that is still mapped stands on the layer it maps, or is written in full.
Result<std::optional<LayerBase>> PageRouter::FindBase(uint32_t vpid, Pid pid,
                                                      const PlannedVma& item) {
  const VmaInfo& vma = item.vma;
  const bool still_mapped = !item.pieces.empty();
  const auto fits = [&](const LayerBase& base) {
    return std::ranges::all_of(item.pieces, [&](const LayerPiece& piece) {
      return piece.layer == base.vma.layer &&
             piece.offset == base.vma.offset + (piece.range.begin - base.vma.range.begin);
    });
  };
  std::optional<LayerBase> base;
  if (options_.parent != nullptr) base = options_.parent->Find(vpid, vma, still_mapped);
  const PageSource now = [&](Vaddr at, std::span<std::byte> page) {
    return ReadMemory(pid, at, page).has_value();
  };
  if (base && fits(*base) && !IsMostlyChanged(*writer_, *base, now)) return base;
  base.reset();
  const auto info = ReadProcess(pid);
  const auto owner = std::ranges::find_if(
      pids_, [&](const auto& entry) { return info && entry.second == info->parent; });
  if (owner == pids_.end() || !tasks_.contains(owner->first)) return base;
  UNMOOR_ASSIGN(base, writer_->FindShared(owner->first, vma.range));
  if (!base) return base;
  const Bytes data = still_mapped ? base->pages.data : vma.anonymous;
  if (!fits(*base) || !writer_->IsMostlyShared(*base, data, now)) base.reset();
  return base;
}

// A frozen thread may have the signal of a fault (SIGSEGV, say) still to take. CRIU would have it
// run its code, whose end is a SIGTRAP; but of such signals the kernel hands over the first,
// blocked or not (dequeue_synchronous_signal in kernel/signal.c), so CRIU would give up, and the
// SIGTRAP left would end the program. Until now CRIU has let no thread but the leader run.
//
// And CRIU takes the kernel's list of threads for whole (see ReadThreads), so that it may have
// missed one, which would write to what is being read.
Result<> PageRouter::CheckFrozen(Pid pid) {
  constexpr uint64_t kOfFaults = SignalBit(SIGSEGV) | SignalBit(SIGBUS) | SignalBit(SIGILL) |
                                 SignalBit(SIGFPE) | SignalBit(SIGTRAP) | SignalBit(SIGSYS);
  UNMOOR_ASSIGN(const std::vector<Pid> threads, ReadThreads(pid));
  for (const Pid thread : threads) {
    UNMOOR_ASSIGN(const SignalSets signals, ReadSignalSets(thread));
    constexpr std::string_view kStandsOrEnded = "tTZX";
    ill_frozen_ = thread != pid && kStandsOrEnded.find(signals.state) == std::string_view::npos;
    if (ill_frozen_) {
      return MachineError("thread {} of process {} was missed each time by criu; try again",
                          thread.value, pid.value);
    }
    // A fault unblocks its signal; one that is blocked was sent, and does no harm.
    ill_frozen_ = (signals.pending & ~signals.blocked & kOfFaults) != 0;
    if (!ill_frozen_) continue;
    return MachineError(
        "thread {} of process {} was frozen each time as it took a fault; try again", thread.value,
        pid.value);
  }
  return {};
}

Result<> PageRouter::OpenTask(uint32_t vpid) {
  UNMOOR_TRY(FaultPoint("dump.open"));
  UNMOOR_ASSIGN(const Pid pid, FindTask(vpid));
  UNMOOR_TRY(CheckFrozen(pid));
  UNMOOR_ASSIGN(std::vector<PlannedVma> plan, Plan(vpid, pid));
  RoutedTask task{pid, std::move(plan), {}};
  task.saved.resize(task.plan.size());
  if (!writer_) {
    writer_.emplace(options_.layers_directory, options_.layer_id,
                    options_.parent != nullptr ? std::span(options_.parent->layers())
                                               : std::span<const LayerReader>(),
                    pids_.size() > 1, options_.sync ? WriteBack::kAsItGoes : WriteBack::kLater);
  }
  std::vector<DeltaVma> mapped;
  for (const PlannedVma& item : task.plan) {
    if (!item.mapped) continue;
    UNMOOR_ASSIGN(auto base, FindBase(vpid, pid, item));
    mapped.push_back({item.vma.range, std::move(base), item.pieces});
  }
  UNMOOR_TRY(writer_->AddTask(vpid, std::move(mapped)));
  cursor_ = 0;
  if (!tasks_.emplace(vpid, std::move(task)).second) {
    return MachineError("CRIU sends the pages of task {} twice", vpid);
  }
  return {};
}

Result<> PageRouter::Pages(criu::PageStreamId id, Vaddr at, uint32_t flags,
                           std::span<const std::byte> data) {
  UNMOOR_TRY(CountReceived(Bytes(data.size())));
  return Keep(RoutePages(id, at, flags, data));
}

Result<> PageRouter::CountReceived(Bytes size) {
  UNMOOR_TRY(Keep(FaultPoint("dump.pages")));
  received_ += size;
  if (!options_.progress) return {};
  if (const Nanos now = MonotonicNow(); now - told_at_ > Nanos(100'000'000)) {
    told_at_ = now;
    options_.progress(received_);
  }
  return {};
}

// The first page of a task is looked at.
Result<std::span<std::byte>> PageRouter::Room(criu::PageStreamId id, Vaddr at, Bytes want) {
  const bool known = !first_pages_.empty() && first_pages_.back().id == id;
  if (id.kind != criu::StreamKind::kTask || !known) return std::span<std::byte>();
  const auto vpid = static_cast<uint32_t>(id.id);
  const auto item = FindVma(vpid, at);
  if (!item) return Keep(Failure(item.error())).map([] { return std::span<std::byte>(); });
  if (!(*item)->mapped) return std::span<std::byte>();
  auto room = writer_->Room(vpid, at, std::min(want, (*item)->vma.range.end - at));
  if (!room) UNMOOR_TRY(Keep(Failure(room.error())));
  return room;
}

Result<> PageRouter::Filled(criu::PageStreamId id, Vaddr at, Bytes size) {
  UNMOOR_TRY(CountReceived(size));
  const auto vpid = static_cast<uint32_t>(id.id);
  tasks_.at(vpid).saved[cursor_] += size;
  return Keep(writer_->Filled(vpid, at, size));
}

Result<const PlannedVma*> PageRouter::FindVma(uint32_t vpid, Vaddr at) {
  const std::vector<PlannedVma>& plan = tasks_.at(vpid).plan;
  while (cursor_ < plan.size() && plan[cursor_].vma.range.end <= at) ++cursor_;
  if (cursor_ < plan.size() && plan[cursor_].vma.range.begin <= at) return &plan[cursor_];
  return MachineError("CRIU sends a page at {} of task {}, where it has no memory", at, vpid);
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
    UNMOOR_ASSIGN(const PlannedVma* const item, FindVma(vpid, at));
    const uint64_t room = std::min<uint64_t>((item->vma.range.end - at).value, data.size());
    const auto part = data.first(room);
    if (item->mapped) {
      UNMOOR_TRY(writer_->Write(vpid, at, part));
    } else {
      UNMOOR_TRY(page_images_.Pages(id, at, flags, part));
    }
    task.saved[cursor_] += Bytes(room);
    data = data.subspan(room);
    at = at + Bytes(room);
  }
  return {};
}

Result<> PageRouter::Absent(criu::PageStreamId id, VaddrRange range, uint32_t flags) {
  return Keep(page_images_.Absent(id, range, flags));
}

Result<> PageRouter::Close() {
  UNMOOR_TRY(Keep(FaultPoint("dump.close")));
  return options_.sync ? Keep(Finish()) : Result<>();
}

Result<> PageRouter::Complete() {
  return finished_ ? Result<>() : Keep(Finish());
}

Result<> PageRouter::Finish() {
  UNMOOR_TRY(FaultPoint("dump.complete"));
  finished_ = true;
  // CRIU refuses a task without any pages of its own: give it one that also is in the layer.
  for (const FirstPage& page : first_pages_) {
    if (page_images_.HasEntries(page.id)) continue;
    UNMOOR_TRY(page_images_.Pages(page.id, page.at, page.flags, page.data));
  }
  UNMOOR_TRY(page_images_.Finish(options_.sync));
  if (writer_) {
    UNMOOR_ASSIGN(layer_, writer_->Finish(options_.sync));
  }
  return {};
}

}  // namespace unmoor
