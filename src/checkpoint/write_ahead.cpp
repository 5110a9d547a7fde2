// See write_ahead.h.
#include "checkpoint/write_ahead.h"

#include <fcntl.h>

#include <algorithm>

#include "base/fault_point.h"
#include "image/delta_writer.h"
#include "image/layer_draft.h"
#include "image/layout.h"
#include "os/file.h"
#include "os/pagemap.h"
#include "os/procfs.h"
#include "os/remote_memory.h"

namespace unmoor {
namespace {

constexpr Bytes kLeastAhead(uint64_t{1} << 20);  // less is read as fast
constexpr uint64_t kChunk = kHugePageSize;       // a place in the file is congruent to its address
constexpr uint64_t kScan = uint64_t{32} << 20;
constexpr uint64_t kLittle = 128;  // a round that finds less than one part in so many is the last

// Memory of one program that the layer is to show.
struct Source {
  Pid pid;
  uint32_t vpid = 0;
  Fd pagemap;
  VaddrRange range;
  bool gone = false;
};

bool ReadPage(Pid pid, Vaddr at, std::span<std::byte> page) {
  return ReadMemory(pid, at, page).has_value();
}

// Whether most of the pages of `range` are the same in both, told from a sample.
bool AreMostlyEqual(Pid a, Pid b, VaddrRange range) {
  constexpr uint64_t kSamples = 128;
  constexpr uint64_t kMostDiffering = kSamples / 4;
  std::vector<std::byte> left(kPageSize);
  std::vector<std::byte> right(kPageSize);
  uint64_t differing = 0;
  for (uint64_t i = 0; i < kSamples; ++i) {
    const Vaddr at = range.begin + Bytes(AlignDown(range.size().value / kSamples * i, kPageSize));
    if (!ReadPage(a, at, left) || !ReadPage(b, at, right) || left != right) ++differing;
  }
  return differing <= kMostDiffering;
}

class Ahead {
 public:
  explicit Ahead(const WriteAheadOptions& options) : options_(options) {}

  [[nodiscard]] Result<> Plan(const std::vector<Pid>& programs);
  [[nodiscard]] Result<std::optional<WrittenAhead>> Write();

 private:
  [[nodiscard]] Result<> PlanProgram(Pid pid);
  [[nodiscard]] bool StandsOnParent(Pid pid, uint32_t vpid, const VmaInfo& vma) const;
  [[nodiscard]] const Source* FindOwner(Pid pid, VaddrRange range) const;
  [[nodiscard]] Result<Bytes> Round();
  [[nodiscard]] Result<Bytes> RoundOf(const Source& source);
  [[nodiscard]] Result<Bytes> Copy(const Source& source, VaddrRange range);
  [[nodiscard]] std::vector<ManifestTask> Describe(const LayerInfo& layer) const;

  const WriteAheadOptions& options_;
  std::vector<Source> sources_;
  struct Shared {
    uint32_t vpid;
    uint32_t owner;
    VaddrRange range;
  };
  std::vector<Shared> shared_;
  std::optional<LayerDraft> draft_;
  std::vector<std::byte> buffer_;
  Bytes expected_;
  Bytes done_;
};

// As the page router decides it while the program stands still (page_router.cpp).
bool Ahead::StandsOnParent(Pid pid, uint32_t vpid, const VmaInfo& vma) const {
  if (options_.parent == nullptr) return false;
  const auto base = options_.parent->Find(vpid, vma);
  if (!base) return false;
  const DeltaWriter reader(options_.directory, options_.layer_id, options_.parent->layers(), false);
  return !IsMostlyChanged(reader, *base,
                          [&](Vaddr at, auto page) { return ReadPage(pid, at, page); });
}

// Of the program that `pid` was forked from.
const Source* Ahead::FindOwner(Pid pid, VaddrRange range) const {
  const auto info = ReadProcess(pid);
  const auto owner = std::ranges::find_if(sources_, [&](const Source& source) {
    return info && source.pid == info->parent && source.range == range;
  });
  return owner == sources_.end() ? nullptr : &*owner;
}

Result<> Ahead::PlanProgram(Pid pid) {
  UNMOOR_ASSIGN(const ProcessInfo info, ReadProcess(pid));
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadSmaps(pid));
  const auto vpid = static_cast<uint32_t>(info.ns_pids.empty() ? pid.value : info.ns_pids.back());
  for (const PlannedVma& item : PlanTask(vmas, options_.plan)) {
    if (!item.mapped || item.vma.anonymous < kLeastAhead) continue;
    if (StandsOnParent(pid, vpid, item.vma)) continue;
    const Source* const owner = FindOwner(pid, item.vma.range);
    if (owner != nullptr && AreMostlyEqual(pid, owner->pid, item.vma.range)) {
      shared_.push_back({vpid, owner->vpid, item.vma.range});
      continue;
    }
    UNMOOR_ASSIGN(Fd pagemap, OpenFile(fmt::format("/proc/{}/pagemap", pid.value), O_RDONLY));
    sources_.push_back({pid, vpid, std::move(pagemap), item.vma.range});
    expected_ += item.vma.anonymous;
  }
  return {};
}

Result<> Ahead::Plan(const std::vector<Pid>& programs) {
  for (const Pid pid : programs) {
    const auto planned = PlanProgram(pid);
    const auto now = ReadProcess(pid);
    if (!now || now->ended()) continue;  // a child that lived for a moment
    UNMOOR_TRY(planned);
  }
  return {};
}

Result<std::optional<WrittenAhead>> Ahead::Write() {
  if (sources_.empty()) return std::optional<WrittenAhead>();
  const std::string layers = LayersDirectory(options_.directory);
  UNMOOR_ASSIGN(draft_, LayerDraft::Create(layers, options_.layer_id));
  for (const Source& source : sources_) UNMOOR_TRY(draft_->AddVma(source.vpid, source.range));
  int rounds = 0;
  Bytes last;
  for (Bytes before = expected_;; before = last) {
    UNMOOR_ASSIGN(last, Round());
    const bool little = last.value < expected_.value / kLittle;
    const bool in_vain = rounds > 0 && last.value > before.value / 2;
    if (++rounds == options_.most_rounds || little || in_vain) break;
    // The disk takes longest, so the next round comes after it.
    UNMOOR_TRY(draft_->Sync());
  }
  UNMOOR_ASSIGN(const LayerInfo info, draft_->Finish());
  draft_.reset();
  UNMOOR_ASSIGN(LayerReader layer,
                LayerReader::Open(LayerPagesPath(options_.directory, options_.layer_id),
                                  LayerIndexPath(options_.directory, options_.layer_id)));
  return std::optional(WrittenAhead{std::move(layer), Describe(info), rounds, last});
}

Result<Bytes> Ahead::Round() {
  UNMOOR_TRY(FaultPoint("dump.round"));
  Bytes written;
  done_ = Bytes(0);
  for (Source& source : sources_) {
    if (source.gone) continue;
    const auto copied = RoundOf(source);
    const auto now = ReadProcess(source.pid);
    source.gone = !now || now->ended();
    if (source.gone) continue;
    UNMOOR_TRY(copied);
    written += *copied;
  }
  return written;
}

Result<Bytes> Ahead::RoundOf(const Source& source) {
  Bytes written;
  for (Vaddr at = source.range.begin; at < source.range.end;) {
    UNMOOR_TRY(options_.go_on());
    const Bytes left = source.range.end - at;
    const VaddrRange part{at, at + Bytes(std::min(left.value, kScan))};
    UNMOOR_ASSIGN(const auto own, ScanPages(source.pagemap.get(), part, PageQuery::kOwn, false));
    for (const VaddrRange run : own) {
      UNMOOR_ASSIGN(const Bytes absent, draft_->ShowZeros(source.vpid, {at, run.begin}));
      UNMOOR_ASSIGN(const Bytes copied, Copy(source, run));
      written += absent + copied;
      at = run.end;
    }
    UNMOOR_ASSIGN(const Bytes absent, draft_->ShowZeros(source.vpid, {at, part.end}));
    written += absent;
    at = part.end;
  }
  return written;
}

Result<Bytes> Ahead::Copy(const Source& source, VaddrRange range) {
  Bytes written;
  for (Vaddr at = range.begin; at < range.end; at = at + Bytes(buffer_.size())) {
    buffer_.resize(std::min((range.end - at).value, kChunk - at.value % kChunk));
    if (!ReadMemory(source.pid, at, buffer_)) continue;  // unmapped by now
    UNMOOR_ASSIGN(const Bytes shown, draft_->Show(source.vpid, at, buffer_));
    written += shown;
    done_ += Bytes(buffer_.size());
    if (options_.progress) options_.progress(done_, std::max(done_, expected_));
  }
  return written;
}

std::vector<ManifestTask> Ahead::Describe(const LayerInfo& layer) const {
  std::vector<ManifestTask> tasks;
  const auto add = [&](uint32_t vpid, VaddrRange range, FileOffset offset) {
    auto task = std::ranges::find(tasks, vpid, &ManifestTask::vpid);
    if (task == tasks.end()) {
      tasks.emplace_back().vpid = vpid;
      task = std::prev(tasks.end());
    }
    ManifestVma& vma = task->vmas.emplace_back();
    vma.range = range;
    vma.kind = VmaKind::kMapped;
    vma.offset = offset;
  };
  for (const Extent& extent : layer.extents) add(extent.task_vpid, extent.range, extent.offset);
  for (const Shared& child : shared_) {
    const auto extent = std::ranges::find_if(layer.extents, [&](const Extent& e) {
      return e.task_vpid == child.owner && e.range == child.range;
    });
    add(child.vpid, child.range, extent->offset);
  }
  return tasks;
}

}  // namespace

Result<std::optional<WrittenAhead>> WriteAhead(const std::vector<Pid>& programs,
                                               const WriteAheadOptions& options) {
  Ahead ahead(options);
  UNMOOR_TRY(ahead.Plan(programs));
  return ahead.Write();
}

}  // namespace unmoor
