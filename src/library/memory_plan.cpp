// See memory_plan.h.
#include "library/memory_plan.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>

#include <algorithm>

#include "image/layout.h"
#include "os/file.h"
#include "os/pagemap.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "remap/range_set.h"

namespace unmoor {
inline namespace v1 {
namespace {

// A range with this many deltas is written in full again: each costs mappings at DirectMap.
constexpr size_t kDeltasBeforeFull = 16;

Result<VaddrRange> ToRange(const MemoryRange& memory) {
  const auto begin = reinterpret_cast<uint64_t>(memory.begin);  // SAFETY: arithmetic only
  if (begin % kPageSize != 0 || memory.size % kPageSize != 0) {
    return UserError("the range at {:#x} of {} bytes is not aligned to pages of {}", begin,
                     memory.size, kPageSize);
  }
  if (memory.size == 0 || begin >= kAddressLimit || memory.size > kAddressLimit - begin) {
    return UserError("the range at {:#x} of {} bytes is empty or beyond all addresses", begin,
                     memory.size);
  }
  return VaddrRange{Vaddr(begin), Vaddr(begin + memory.size)};
}

// The pages of a private mapping that are the process's own. Everything where the kernel can't
// tell.
class OwnPages {
 public:
  OwnPages() {
    if (auto fd = OpenFile("/proc/self/pagemap", O_RDONLY)) pagemap_ = std::move(*fd);
  }
  [[nodiscard]] std::vector<VaddrRange> In(VaddrRange range) const {
    if (!pagemap_.valid()) return {range};
    return ScanPages(pagemap_.get(), range, PageQuery::kOwn, false)
        .value_or(std::vector<VaddrRange>{range});
  }

 private:
  Fd pagemap_;
};

Result<PlannedRange> PlanVma(const VmaInfo& vma, VaddrRange part, const OwnPages& own_pages) {
  if (vma.shared) {
    return UserError("{} ({}) is a shared mapping; an image holds private memory", part, vma.name);
  }
  PlannedRange planned;
  planned.range = part;
  planned.prot = vma.prot;
  planned.anonymous = vma.inode == 0;
  planned.device = makedev(vma.dev_major, vma.dev_minor);
  planned.inode = vma.inode;
  planned.offset = vma.offset + (part.begin - vma.range.begin);
  const bool readable = (vma.prot & PROT_READ) != 0;
  if (planned.anonymous || !readable) {
    planned.look_at = own_pages.In(part);
  } else {
    planned.look_at = {part};
  }
  if (readable || (planned.anonymous && planned.look_at.empty())) return planned;
  return UserError("{} ({}) holds data but cannot be read (PROT_READ is missing)", part,
                   vma.name.empty() ? "anonymous" : vma.name);
}

// The parts of `ranges`, which are ascending and apart, inside `range`.
std::vector<VaddrRange> Inside(std::span<const VaddrRange> ranges, VaddrRange range) {
  std::vector<VaddrRange> inside;
  auto r = std::ranges::partition_point(
      ranges, [&](const VaddrRange& other) { return other.end <= range.begin; });
  for (; r != ranges.end() && r->begin < range.end; ++r) inside.push_back(r->Intersect(range));
  return inside;
}

// Pages of `planned` that may differ from `base`, of which it is a part.
RangeSet MayDiffer(const PlannedRange& planned, const PageImage::Impl& base, const VmaPages& pages,
                   const OwnPages& own_pages) {
  RangeSet set;
  // Whether the pages nobody wrote to are those of some layer of the base, and which.
  const SharedLayer* mapped = nullptr;
  for (const auto& layer : base.layers) {
    const auto info = StatFd(layer->reader().pages_fd().get(), layer->reader().pages_path());
    if (!planned.anonymous && info && info->st_ino == planned.inode &&
        info->st_dev == planned.device) {
      mapped = layer.get();
    }
  }
  if (!planned.anonymous && mapped == nullptr) {
    set.Insert(planned.range);
    return set;
  }
  for (const VaddrRange& own : own_pages.In(planned.range)) set.Insert(own);
  // Untouched pages are the mapped file's, or zeros: right only where the base says the same.
  RangeSet same;
  for (const OverlayRun& run : pages.all) {
    const VaddrRange part = run.range.Intersect(planned.range);
    if (part.empty()) continue;
    const FileOffset in_layer = run.offset + (part.begin - run.range.begin);
    const FileOffset in_file = planned.offset + (part.begin - planned.range.begin);
    if (mapped != nullptr && base.layers[run.layer].get() == mapped && in_layer == in_file) {
      same.Insert(part);
    } else {
      set.Insert(part);
    }
  }
  if (mapped == nullptr) return set;
  // Where the base has nothing its own layer has a hole; another layer's bytes are compared.
  const ManifestVma& vma = base.vmas()[static_cast<size_t>(planned.base_vma)];
  if (base.layers[vma.layer].get() == mapped &&
      vma.offset + (planned.range.begin - vma.range.begin) == planned.offset) {
    return set;
  }
  for (const VaddrRange& rest : same.Outside(planned.range)) set.Insert(rest);
  return set;
}

std::vector<VaddrRange> LookAt(const PlannedRange& planned, const PageImage::Impl& base,
                               std::span<const VaddrRange> tracked,
                               std::span<const VaddrRange> changed, const OwnPages& own_pages) {
  const VmaPages& pages = base.pages[static_cast<size_t>(planned.base_vma)];
  RangeSet by_tracker;
  for (const VaddrRange& range : Inside(tracked, planned.range)) by_tracker.Insert(range);
  RangeSet look_at;
  for (const VaddrRange& range : by_tracker.Inside(planned.range)) {
    for (const VaddrRange& written : Inside(changed, range)) look_at.Insert(written);
  }
  const std::vector<VaddrRange> untracked = by_tracker.Outside(planned.range);
  if (untracked.empty()) return look_at.Inside(planned.range);
  const RangeSet differ = MayDiffer(planned, base, pages, own_pages);
  for (const VaddrRange& range : untracked) {
    for (const VaddrRange& part : differ.Inside(range)) look_at.Insert(part);
  }
  return look_at.Inside(planned.range);
}

// `whole` cut down to `part`.
PlannedRange Cut(const PlannedRange& whole, VaddrRange part) {
  PlannedRange cut = whole;
  cut.range = part;
  cut.offset = whole.offset + (part.begin - whole.range.begin);
  cut.look_at = Inside(whole.look_at, part);
  return cut;
}

}  // namespace

Result<> SortRanges(std::vector<PlannedRange>& ranges) {
  std::ranges::sort(ranges, {}, [](const PlannedRange& r) { return r.range.begin; });
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i - 1].range.Overlaps(ranges[i].range)) {
      return UserError("the ranges {} and {} overlap", ranges[i - 1].range, ranges[i].range);
    }
  }
  return {};
}

Result<std::vector<PlannedRange>> PlanMemory(std::span<const MemoryRange> memory) {
  std::vector<VaddrRange> wanted;
  for (const MemoryRange& range : memory) {
    UNMOOR_ASSIGN(const VaddrRange checked, ToRange(range));
    wanted.push_back(checked);
  }
  UNMOOR_ASSIGN(const std::vector<VmaInfo> maps, ReadMaps(OwnPid()));
  const OwnPages own_pages;
  std::vector<PlannedRange> planned;
  for (const VaddrRange& range : wanted) {
    Vaddr at = range.begin;
    auto vma = std::ranges::partition_point(
        maps, [&](const VmaInfo& v) { return v.range.end <= range.begin; });
    for (; at < range.end && vma != maps.end() && vma->range.begin <= at; ++vma) {
      UNMOOR_ASSIGN(PlannedRange part, PlanVma(*vma, vma->range.Intersect(range), own_pages));
      at = part.range.end;
      planned.push_back(std::move(part));
    }
    if (at < range.end) return UserError("nothing is mapped at {} of the range {}", at, range);
  }
  UNMOOR_TRY(SortRanges(planned));
  return planned;
}

Result<std::vector<PlannedRange>> RelateToBase(std::vector<PlannedRange> ranges,
                                               const PageImage::Impl& base,
                                               std::span<const VaddrRange> tracked,
                                               std::span<const VaddrRange> changed) {
  const OwnPages own_pages;
  const std::vector<ManifestVma>& vmas = base.vmas();
  std::vector<PlannedRange> related;
  for (const PlannedRange& range : ranges) {
    Vaddr at = range.range.begin;
    auto vma = std::ranges::partition_point(
        vmas, [&](const ManifestVma& v) { return v.range.end <= range.range.begin; });
    for (; vma != vmas.end() && vma->range.begin < range.range.end; ++vma) {
      const VaddrRange shared = vma->range.Intersect(range.range);
      if (vma->deltas.size() >= kDeltasBeforeFull) continue;
      if (at < shared.begin) related.push_back(Cut(range, {at, shared.begin}));
      PlannedRange part = Cut(range, shared);
      part.base_vma = static_cast<int>(vma - vmas.begin());
      part.look_at = LookAt(part, base, tracked, changed, own_pages);
      related.push_back(std::move(part));
      at = shared.end;
    }
    if (at < range.range.end) related.push_back(Cut(range, {at, range.range.end}));
  }
  return related;
}

}  // namespace v1
}  // namespace unmoor
