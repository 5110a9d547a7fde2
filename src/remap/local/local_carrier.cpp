// See local_carrier.h.
#include "remap/local/local_carrier.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "base/fault_point.h"
#include "image/layout.h"
#include "os/file.h"
#include "os/kernel_abi.h"
#include "os/own_memory.h"
#include "os/pagemap.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/userfaultfd.h"
#include "remap/page_image.h"

namespace unmoor::local {
namespace {

constexpr size_t kSpareMaps = 64;  // what the remap may need for itself
constexpr std::string_view kRing = "anon_inode:[io_uring]";
constexpr Nanos kPinCheckInterval(50'000'000);
constexpr Nanos kPatience(8'000'000'000);      // for threads that do not come to rest
constexpr int64_t kLongestStop = 250'000'000;  // ns; of one window in vain
constexpr int64_t kRestAfterVain = 3;          // times as long as the window took
constexpr int kPlanAttempts = 1000;
constexpr size_t kRefusalsOfAnArea = 64;
constexpr size_t kMappedParts = 64;  // of the first last look
constexpr Nanos kAfterRing(500'000'000);
constexpr Bytes kHotChunk(uint64_t{32} << 20);

constexpr struct {
  const char* flag;
  int advice;
} kFlagAdvice[] = {{"hg", MADV_HUGEPAGE},  {"nh", MADV_NOHUGEPAGE}, {"dd", MADV_DONTDUMP},
                   {"mg", MADV_MERGEABLE}, {"sr", MADV_SEQUENTIAL}, {"rr", MADV_RANDOM},
                   {"dc", MADV_DONTFORK}};

// VmPin: what RDMA, and buffers registered with an io_uring, hold for good.
Result<Bytes> PinnedMemory() {
  UNMOOR_ASSIGN(const std::string status, ReadFile("/proc/self/status"));
  const size_t at = status.find("\nVmPin:");
  if (at == std::string::npos) return Bytes(0);
  return Bytes(std::strtoull(status.c_str() + at + 7, nullptr, 10) << 10);
}

uint64_t DeviceOf(const Area& area) {
  return uint64_t{area.dev_major} << 32 | area.dev_minor;
}

Failure Errno(int errnum, std::string message) {
  return Failure(Error(ErrorKind::kMachine, errnum, std::move(message)));
}

bool SameMapping(const Area& a, const Area& b) {
  return a.inode == b.inode && DeviceOf(a) == DeviceOf(b) && a.prot == b.prot &&
         a.offset - a.range.begin.value == b.offset - b.range.begin.value;
}

Area Cut(const Area& area, VaddrRange part) {
  Area cut = area;
  cut.offset = area.OffsetOf(part.begin).value;
  cut.range = part;
  return cut;
}

bool IsFileOf(int fd, const Area& area) {
  const auto info = StatFd(fd, "page image");
  return info && info->st_ino == area.inode && major(info->st_dev) == area.dev_major &&
         minor(info->st_dev) == area.dev_minor;
}

std::string NameOf(const Area& area) {
  const auto vmas = ReadMaps(OwnPid());
  if (!vmas) return {};
  const auto vma = std::ranges::find_if(
      *vmas, [&](const VmaInfo& v) { return v.range.Contains(area.file_vma.begin); });
  return vma == vmas->end() ? std::string() : vma->name;
}

}  // namespace

// --- what the carriers of one remapper share ----------------------------------------------------

RemapShare::RemapShare(std::shared_ptr<Watcher> watcher, std::vector<ScopeRange> scope,
                       std::vector<ImageSource> sources, bool verify)
    : watcher_(std::move(watcher)),
      scope_(std::move(scope)),
      sources_(std::move(sources)),
      verify_(verify),
      memory_room_(OwnPid()) {}

RemapShare::~RemapShare() {
  if (!watcher_->IsOfThisProcess()) return;  // its mirrors were unmapped by the fork
  watcher_->ForgetRefusal(this);
  for (const Mirror& mirror : mirrors_) {
    locks.address_space.Acquire();
    RemoveMirror(mirror.reserved.memory.begin.value);
    locks.address_space.Release();
    UnmapOwn(mirror.reserved.whole);
  }
  for (const auto& [area, image] : images_) {
    locks.address_space.Acquire();
    ForgetImageFile(image->fd);
    locks.address_space.Release();
  }
  for (const Area& area : watched_) {
    locks.address_space.Acquire();
    RemoveImage(DeviceOf(area), area.inode);
    locks.address_space.Release();
  }
  watcher_->Disclaim(adopted_);
  for (const ScopeRange& scope : scope_) adopted_.push_back(scope.memory);
  for (const VaddrRange range : adopted_) {
    if (!IsTracked(range.begin.value, range.end.value)) watcher_->Unwatch(range);
  }
}

Result<> RemapShare::WatchScope() {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(OwnPid()));
  for (const VmaInfo& vma : vmas) {
    if (!MapsPageImage(vma)) continue;
    for (const ScopeRange& scope : scope_) {
      const VaddrRange part = scope.memory.Intersect(vma.range);
      if (part.empty()) continue;
      Area area;
      area.range = part;
      area.file_vma = vma.range;
      area.inode = vma.inode;
      area.dev_major = vma.dev_major;
      area.dev_minor = vma.dev_minor;
      area.offset = (vma.offset + (part.begin - vma.range.begin)).value;
      locks.address_space.Acquire();
      const bool room = AddImage(DeviceOf(area), area.inode);
      locks.address_space.Release();
      if (!room) return Errno(ENOMEM, "too many page images are being remapped at once");
      {
        const std::lock_guard lock(mutex_);
        watched_.push_back(area);
      }
      (void)ImageOf(area);  // memory that grows is zeroed where its file has data: from now on
      UNMOOR_TRY(watcher_->Watch(part));
    }
  }
  return {};
}

bool RemapShare::AdoptMoved(const Area& area) {
  const std::lock_guard lock(mutex_);
  const bool ours = std::ranges::any_of(watched_, [&](const Area& watched) {
    return watched.inode == area.inode && DeviceOf(watched) == DeviceOf(area) &&
           watched.offset <= area.offset && area.offset < watched.OffsetOf(watched.range.end).value;
  });
  if (!ours || !watcher_->Claim(std::span(&area.range, 1))) return false;
  adopted_.push_back(area.range);
  return true;
}

Result<std::vector<VaddrRange>> RemapShare::FindMapped() {
  MappedParts found;
  std::vector<MappedPart> parts(kMappedParts);
  constexpr int64_t kFirstStop = 1'000'000;
  int64_t limit = kFirstStop;
  for (const Nanos began = MonotonicNow(); !found.whole;) {
    if (MonotonicNow() - began > kPatience) {
      return Errno(EBUSY, "the threads do not come to rest for a last look");
    }
    found =
        FindMappedFrozen(watcher_->fds(), limit, parts.data(), static_cast<uint32_t>(parts.size()));
    if (found.open && !found.whole) parts.resize(4 * parts.size());  // of other remappers
    if (found.open) continue;
    SleepFor(Nanos(kRestAfterVain * limit));
    limit = std::min(2 * limit, kLongestStop);
  }
  std::vector<VaddrRange> ours;
  const RangeSet refused = this->refused();
  for (uint32_t i = 0; i < found.count; ++i) {
    const MappedPart& part = parts[i];
    Area area;
    area.range = {Vaddr(part.begin), Vaddr(part.end)};
    area.dev_major = static_cast<uint32_t>(part.device >> 32);
    area.dev_minor = static_cast<uint32_t>(part.device);
    area.inode = part.inode;
    area.offset = part.offset;
    std::vector<VaddrRange> known = KnownParts(area.range);
    if (known.empty() && AdoptMoved(area)) known.push_back(area.range);
    for (const VaddrRange range : known) {
      for (const VaddrRange left : refused.Outside(range)) ours.push_back(left);
    }
  }
  return ours;
}

std::vector<VaddrRange> RemapShare::KnownParts(VaddrRange range) const {
  const std::lock_guard lock(mutex_);
  std::vector<VaddrRange> parts = adopted_;
  for (const ScopeRange& scope : scope_) parts.push_back(scope.memory);
  for (VaddrRange& part : parts) part = part.Intersect(range);
  std::erase_if(parts, [](VaddrRange part) { return part.empty(); });
  return parts;
}

// One mirror for each area, kept as long as the remapper: pages moved from one mirror to one area
// are one VMA afterwards.
Result<MirrorPlace> RemapShare::MirrorFor(const Area& area) {
  VaddrRange hull{area.range.end, area.range.begin};
  for (const ScopeRange& scope : scope_) {
    const VaddrRange part = scope.memory.Intersect(area.range);
    if (part.empty()) continue;
    hull = {std::min(hull.begin, part.begin), std::max(hull.end, part.end)};
  }
  if (hull.empty()) hull = area.range;  // moved here by the program
  const Area wanted = Cut(area, hull);
  const std::lock_guard lock(mutex_);
  auto mirror = std::ranges::find_if(mirrors_, [&](const Mirror& m) {
    return m.area.range.Contains(wanted.range) && SameMapping(m.area, wanted);
  });
  if (mirror == mirrors_.end()) {
    UNMOOR_ASSIGN(Mirror made, MakeMirror(wanted));
    const MirrorPlace place{made.area.range.begin.value,
                            made.area.range.end.value,
                            DeviceOf(made.area),
                            made.area.inode,
                            made.area.offset,
                            static_cast<uint32_t>(made.area.prot),
                            made.reserved.memory.begin.value};
    mirrors_.push_back(std::move(made));
    mirror = std::prev(mirrors_.end());
    locks.address_space.Acquire();
    const bool room = AddMirror(place);
    locks.address_space.Release();
    if (!room) return Errno(ENOMEM, "too many separate areas to remap at once");
  }
  return MirrorPlace{mirror->area.range.begin.value,
                     mirror->area.range.end.value,
                     DeviceOf(mirror->area),
                     mirror->area.inode,
                     mirror->area.offset,
                     static_cast<uint32_t>(mirror->area.prot),
                     mirror->reserved.memory.begin.value};
}

Result<RemapShare::Mirror> RemapShare::MakeMirror(const Area& area) const {
  UNMOOR_ASSIGN(const ReservedMemory reserved,
                ReserveOwnMemory(area.range.size(), area.range.begin.value, area.HasFlag("nr")));
  // Touching its first page gives the whole mirror one anon_vma before it is ever split; without
  // that the pieces could not join again. SAFETY: fresh memory of ours.
  *reinterpret_cast<volatile char*>(reserved.memory.begin.value) = 1;
  const Bytes touched(std::min(area.range.size().value, kHugePageSize));
  (void)AdviseOwn({reserved.memory.begin, reserved.memory.begin + touched}, MADV_DONTNEED);
  for (const auto& f : kFlagAdvice) {
    if (area.HasFlag(f.flag)) (void)AdviseOwn(reserved.memory, f.advice);
  }
  return Mirror{area, reserved};
}

const RemapShare::Image* RemapShare::ImageOf(const Area& area) {
  const std::lock_guard lock(mutex_);
  for (const auto& [known, image] : images_) {
    const bool same = known.inode == area.inode && DeviceOf(known) == DeviceOf(area);
    if (same && image->fd >= 0) return image.get();
  }
  auto image = std::make_unique<Image>(OpenImage(area));
  locks.address_space.Acquire();
  SetImageFile(DeviceOf(area), area.inode, image->fd);
  locks.address_space.Release();
  images_.emplace_back(area, std::move(image));
  return images_.back().second.get();
}

// The caller's knowledge first; then the file by its name, if it is still the same file; then by
// /proc, where our rights allow. Without any of these pages are read through the mapping.
RemapShare::Image RemapShare::OpenImage(const Area& area) const {
  Image image;
  for (const ImageSource& source : sources_) {
    const VaddrRange part = source.memory.Intersect(area.range);
    if (part.empty() ||
        source.offset + (part.begin - source.memory.begin) != area.OffsetOf(part.begin)) {
      continue;
    }
    image.layer = source.layer;
    image.fd = source.layer->pages_fd().get();
    image.path = source.layer->pages_path();
    return image;
  }
  image.path = NameOf(area);
  const std::string by_range = fmt::format("/proc/self/map_files/{:x}-{:x}",
                                           area.file_vma.begin.value, area.file_vma.end.value);
  for (const std::string& path : {image.path, by_range}) {
    auto fd = OpenFile(path, O_RDONLY);
    if (!fd || !IsFileOf(fd->get(), area)) continue;
    image.opened = std::move(*fd);
    image.fd = image.opened.get();
    break;
  }
  if (!verify_ || image.fd < 0 || !image.path.ends_with(kPagesSuffix)) return image;
  std::string index = image.path.substr(0, image.path.size() - kPagesSuffix.size());
  index += kIndexSuffix;
  auto layer = LayerReader::Open(image.path, index);
  if (!layer || !IsFileOf(layer->pages_fd().get(), area) || !layer->LoadHashes()) return image;
  image.layer = std::make_shared<const LayerReader>(std::move(*layer));
  return image;
}

void RemapShare::Refuse(VaddrRange range, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  refused_.Insert(range);
  ++refusals_;
  if (refusal_.empty()) refusal_ = reason;
  watcher_->NoteRefusal(this, reason);
}

RangeSet RemapShare::refused() const {
  const std::lock_guard lock(mutex_);
  return refused_;
}

std::string RemapShare::refusal() const {
  const std::lock_guard lock(mutex_);
  if (refusals_ <= 1) return refusal_;
  return fmt::format("{} (and {} more)", refusal_, refusals_ - 1);
}

size_t RemapShare::refusals() const {
  const std::lock_guard lock(mutex_);
  return refusals_;
}

// --- planning -----------------------------------------------------------------------------------

LocalCarrier::LocalCarrier(std::shared_ptr<RemapShare> share, std::vector<ScopeRange> scope,
                           LocalOptions options)
    : share_(std::move(share)),
      scope_(std::move(scope)),
      options_(std::move(options)),
      bounce_(kBlockSize),
      room_(std::make_unique<WindowRoom>()) {}

LocalCarrier::~LocalCarrier() {
  if (!share_->watcher().IsOfThisProcess()) {
    (void)staging_.Release();
    return;
  }
  if (!scratch_.whole.empty()) UnmapOwn(scratch_.whole);
}

Result<std::vector<Carrier::PlannedArea>> LocalCarrier::Plan() {
  UNMOOR_TRY(CheckNoPinnedMemory());
  share_->memory_room().FindGroups();
  for (int attempt = 0;; ++attempt) {
    auto planned = PlanOnce();
    // Reading the list takes its time: what moved down meanwhile is in neither half. So nothing is
    // left only when there is nothing twice.
    if (planned && plan_.empty()) planned = PlanOnce();
    if (planned) break;
    // The program runs: what was read a moment ago may be unmapped or mapped over by now.
    const int errnum = planned.error().errnum();
    if ((errnum != EINVAL && errnum != ENOENT) || attempt == kPlanAttempts) {
      return Failure(planned.error());
    }
    UNMOOR_TRY(HandleEvents());
  }
  SortPlan();
  std::vector<PlannedArea> areas;
  for (const Planned& p : plan_) areas.push_back(p.planned);
  return areas;
}

Result<> LocalCarrier::PlanOnce() {
  plan_.clear();
  stale_ = false;
  // The flags of mappings cost a walk over every page of the process: not to learn that all is
  // done.
  UNMOOR_ASSIGN(std::vector<VmaInfo> vmas, ReadMaps(OwnPid()));
  if (std::ranges::none_of(vmas, MapsPageImage)) return {};
  UNMOOR_ASSIGN(vmas, ReadSmaps(OwnPid()));
  if (vmas.size() + kSpareMaps > MaxMapCount()) {
    return Errno(ENOMEM, fmt::format("the process has {} of the {} mappings it may have; raise "
                                     "vm.max_map_count",
                                     vmas.size(), MaxMapCount()));
  }
  const std::vector<Area> areas = FindAreas(vmas, MapsPageImage, none_);
  const RangeSet refused = share_->refused();
  for (const ScopeRange& scope : scope_) {
    for (const Area& area : areas) {
      for (const VaddrRange part : refused.Outside(scope.memory.Intersect(area.range))) {
        UNMOOR_TRY(PlanPart(area, part, scope.guarded));
      }
    }
  }
  for (const Area& area : areas) UNMOOR_TRY(AdoptMoved(area, refused));
  return {};
}

// What the program moved out of the scope is still watched where it is now, and still ours to
// remap.
Result<> LocalCarrier::AdoptMoved(const Area& area, const RangeSet& refused) {
  if (!area.HasFlag("uw") || !share_->AdoptMoved(area)) return {};
  scope_.push_back({area.range, false});
  for (const VaddrRange part : refused.Outside(area.range)) {
    UNMOOR_TRY(PlanPart(area, part, false));
  }
  return {};
}

Result<> LocalCarrier::PlanPart(const Area& whole, VaddrRange part, bool guarded) {
  const RemapShare::Image* image = share_->ImageOf(whole);
  Planned planned;
  planned.planned.area = Cut(whole, part);
  planned.image = image;
  planned.guarded = guarded;
  const VaddrRange lost = RefuseTruncated(planned.planned.area, *image);
  if (!lost.empty()) {
    if (lost.begin == part.begin) return {};
    return PlanPart(whole, {part.begin, lost.begin}, guarded);
  }
  UNMOOR_ASSIGN(planned.mirror, share_->MirrorFor(whole));
  UNMOOR_TRY(share_->watcher().Watch(part));
  planned.planned.image_data = DataOf(planned.planned.area, *image);
  plan_.push_back(std::move(planned));
  return {};
}

// A page behind the end of its file is the program's SIGBUS to take; zeros must not take its place.
VaddrRange LocalCarrier::RefuseTruncated(const Area& area, const RemapShare::Image& image) {
  if (image.fd < 0) return {};
  const auto info = StatFd(image.fd, image.path);
  if (!info) return {};
  const auto size = static_cast<uint64_t>(info->st_size);
  const uint64_t end = area.OffsetOf(area.range.end).value;
  const bool shorter = image.layer != nullptr && size < image.layer->info().file_size.value;
  if (size >= end || (image.layer == nullptr && size + kPageSize > end)) return {};
  const uint64_t kept = AlignDown(std::max(size, area.offset) - area.offset, kPageSize);
  const VaddrRange lost{area.range.begin + Bytes(kept), area.range.end};
  share_->Refuse(lost, fmt::format("{} was truncated{}: it ends at offset {}, so memory {} stays "
                                   "direct-mapped",
                                   image.path, shorter ? " since it was made" : "", size, lost));
  return lost;
}

RangeSet LocalCarrier::DataOf(const Area& area, const RemapShare::Image& image) const {
  RangeSet data;
  const FileRange wanted{FileOffset(area.offset), area.OffsetOf(area.range.end)};
  const auto insert = [&](FileRange range) {
    const FileRange part = range.Intersect(wanted);
    if (part.empty()) return;
    data.Insert({area.range.begin + (part.begin - wanted.begin),
                 area.range.begin + (part.end - wanted.begin)});
  };
  if (image.layer != nullptr) {
    for (const Segment& segment : image.layer->segments()) insert(segment.file_range());
    return data;
  }
  const auto ranges = image.fd < 0 ? Result<std::vector<FileRange>>(Errno(EBADF, ""))
                                   : DataRanges(image.fd, wanted, image.path);
  if (!ranges) insert(wanted);
  if (ranges) std::ranges::for_each(*ranges, insert);
  return data;
}

void LocalCarrier::SortPlan() {
  const auto by_address = [](const Planned& a, const Planned& b) {
    return a.planned.area.range.begin < b.planned.area.range.begin;
  };
  if (options_.order == CopyOrder::kSequential) std::ranges::sort(plan_, by_address);
  if (options_.order != CopyOrder::kHotFirst) return;
  std::vector<std::pair<Bytes, Planned>> chunks;
  for (const Planned& planned : plan_) {
    const VaddrRange range = planned.planned.area.range;
    for (Vaddr at = range.begin; at < range.end;) {
      const Vaddr end =
          std::min(range.end, Vaddr(AlignDown(at.value, kHotChunk.value) + kHotChunk.value));
      Planned chunk = planned;
      chunk.planned.area = Cut(planned.planned.area, {at, end});
      Bytes own;
      const auto pages = OwnPages({at, end}, false);
      if (pages) {
        for (const VaddrRange run : *pages) own += run.size();
      }
      chunks.emplace_back(own, std::move(chunk));
      at = end;
    }
  }
  std::ranges::stable_sort(chunks, [](const auto& a, const auto& b) { return a.first > b.first; });
  plan_.clear();
  for (auto& [own, chunk] : chunks) plan_.push_back(std::move(chunk));
}

// Memory that devices or the kernel write to behind the page tables cannot be moved safely, and
// nothing tells which it is; so with asynchronous I/O set up everything is left alone.
Result<> LocalCarrier::CheckNoPinnedMemory() {
  last_pin_check_ = MonotonicNow();
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(OwnPid()));
  bool ring = false;
  for (const VmaInfo& vma : vmas) {
    if (vma.name.starts_with("/[aio]")) {
      return Errno(EBUSY, "the process uses Linux AIO, whose buffers must not move; close it");
    }
    ring = ring || vma.name == kRing;  // lives on while it is mapped
  }
  UNMOOR_ASSIGN(const std::vector<std::string> fds, ListDirectory("/proc/self/fd"));
  for (const std::string& fd : fds) {
    const auto target = ReadLink("/proc/self/fd/" + fd);
    ring = ring || (target && *target == kRing);
  }
  if (ring) {
    ring_seen_ = true;
    return Errno(EBUSY, "the process uses io_uring, whose buffers must not move; close it");
  }
  // The kernel ends what a closed ring had under way when it comes to it, and nothing tells when.
  if (std::exchange(ring_seen_, false)) SleepFor(kAfterRing);
  UNMOOR_ASSIGN(const Bytes pinned, PinnedMemory());
  if (pinned.value > 0) {
    return Errno(EBUSY,
                 fmt::format("{} bytes of the process's memory are pinned for a device or an "
                             "io_uring, and must not move; release them",
                             pinned.value));
  }
  return {};
}

// --- events -------------------------------------------------------------------------------------

Result<bool> LocalCarrier::HandleEvents() {
  if (options_.gate) UNMOOR_TRY(options_.gate(Bytes(0)));
  return std::exchange(stale_, false);
}

void LocalCarrier::Pause(Nanos time) {
  SleepFor(time);
}

// --- copying ------------------------------------------------------------------------------------

Result<std::vector<VaddrRange>> LocalCarrier::OwnPages(VaddrRange range, bool written_only) {
  std::vector<VaddrRange> pages;
  const auto scanned = ScanOwnPages(share_->watcher().fds().pagemap, range, written_only,
                                    [&](VaddrRange run, bool written) {
                                      if (written) NoteWritten(run.begin.value, run.end.value);
                                      if (!pages.empty() && pages.back().end == run.begin) {
                                        pages.back().end = run.end;
                                      } else {
                                        pages.push_back(run);
                                      }
                                    });
  if (!scanned) stale_ = true;
  return pages;
}

// Copies that were made and not swapped yet are given up where there is no room for the rest: the
// program needs the memory more than we do.
Result<> LocalCarrier::TakeMemory(std::span<const CopyStep> steps) {
  Bytes size;
  for (const CopyStep& step : steps) size += step.content.size();
  auto taken = share_->memory_room().Take(size);
  if (taken) return {};
  for (const Planned& p : plan_) {
    const VaddrRange area = p.planned.area.range;
    (void)AdviseOwn({p.At(area.begin), p.At(area.end)}, MADV_DONTNEED);
  }
  return Failure(std::move(taken).error());
}

Result<> LocalCarrier::EnsureScratch() {
  if (!scratch_.whole.empty()) return {};
  UNMOOR_ASSIGN(scratch_, ReserveOwnMemory(Bytes(kHugePageSize), 0, false));
  (void)AdviseOwn(scratch_.memory, MADV_HUGEPAGE);
  (void)AdviseOwn(scratch_.memory, MADV_DONTFORK);  // a page a child shares could not be moved
  auto staging = CreateOwnUserFaultFd(kernel::kUffdFeatureMove);
  can_move_ = staging.has_value();
  if (staging) staging_ = std::move(*staging);
  return {};
}

Result<> LocalCarrier::Copy(size_t index, std::span<const CopyStep> steps) {
  const Planned& target = plan_[index];
  const VaddrRange mirror{target.At(steps.front().block.begin), target.At(steps.back().block.end)};
  // A block copied before and given back, or of an earlier plan, starts afresh.
  (void)AdviseOwn(mirror, MADV_DONTNEED);
  UNMOOR_TRY(TakeMemory(steps));
  if (target.planned.area.prot != (PROT_READ | PROT_WRITE)) {
    (void)ProtectOwn(mirror, PROT_READ | PROT_WRITE);
  }
  UNMOOR_TRY(EnsureScratch());
  VaddrRange huge_span;
  for (const CopyStep& step : steps) {
    if (!step.huge || !can_move_) continue;
    if (huge_span.empty()) huge_span.begin = target.At(step.block.begin);
    huge_span.end = target.At(step.block.end);
  }
  if (!huge_span.empty()) {
    UNMOOR_TRY(UffdRegister(staging_.get(), huge_span, UffdMode::kMissing));
    Result<> copied;
    for (const CopyStep& step : steps) {
      if (copied && step.huge && !stale_) copied = CopyHuge(target, step);
    }
    UNMOOR_TRY(UffdUnregister(staging_.get(), huge_span));
    UNMOOR_TRY(copied);
  }
  Bytes size;
  for (const CopyStep& step : steps) {
    size += step.content.size();
    if ((step.huge && can_move_) || stale_) continue;
    UNMOOR_TRY(CopyContent(target, step.content, step.block.begin, target.At(step.block.begin)));
  }
  if (options_.gate) UNMOOR_TRY(options_.gate(size));
  return {};
}

// A whole block by way of the scratch block: UFFDIO_MOVE gives its huge page away.
Result<> LocalCarrier::CopyHuge(const Planned& target, const CopyStep& step) {
  UNMOOR_TRY(CopyContent(target, step.content, step.block.begin, scratch_.memory.begin));
  if (stale_) return {};
  const int error = MoveOwnPages(staging_.get(), target.At(step.block.begin), scratch_.memory.begin,
                                 Bytes(kHugePageSize));
  if (error != 0) return SystemError(error, "cannot move a page into staging");
  return {};
}

// `to` stands for `block`.
Result<> LocalCarrier::CopyContent(const Planned& target, const BlockContent& content, Vaddr block,
                                   Vaddr to) {
  for (const VaddrRange pages : content.image) {
    UNMOOR_TRY(ReadImage(target, pages, to + (pages.begin - block)));
  }
  for (const VaddrRange pages : content.own) {
    UNMOOR_TRY(CopyOwn(pages, to + (pages.begin - block)));
  }
  return {};
}

Result<> LocalCarrier::ReadImage(const Planned& target, VaddrRange pages, Vaddr to) {
  const RemapShare::Image& image = *target.image;
  if (image.fd < 0) return CopyOwn(pages, to);
  const FileOffset begin = target.planned.area.OffsetOf(pages.begin);
  const bool verify = options_.verify && image.layer != nullptr;
  if (!verify) return ReadBlock(target, begin, pages, to);
  for (Vaddr at = pages.begin; at < pages.end && !stale_;) {
    const FileOffset offset = begin + (at - pages.begin);
    const FileOffset block(AlignDown(offset.value, kBlockSize));
    const Bytes rest(block.value + kBlockSize - offset.value);
    const VaddrRange part{at, std::min(pages.end, at + rest)};
    UNMOOR_TRY(ReadBlock(target, block, part, to + (at - pages.begin)));
    at = part.end;
  }
  return {};
}

// `pages` of one hashed block, compared before they are used; what is compared is what is used.
// Without a hash to compare with, `block` is the offset of pages.begin.
Result<> LocalCarrier::ReadBlock(const Planned& target, FileOffset block, VaddrRange pages,
                                 Vaddr to) {
  const RemapShare::Image& image = *target.image;
  const bool verify = options_.verify && image.layer != nullptr;
  const bool whole = !verify || pages.size().value == kBlockSize;
  // SAFETY: only handed to pread and the hash.
  const Vaddr into = whole ? to : Vaddr(reinterpret_cast<uint64_t>(bounce_.data()));
  const Bytes length = whole ? pages.size() : Bytes(kBlockSize);
  const int error = ReadFileInto(image.fd, into, length, block);
  if (error == ENODATA) {
    RefuseBlock(target, pages.begin, block, "ends before");
    return {};
  }
  if (error == EFAULT) {
    stale_ = true;
    return {};
  }
  if (error == EIO) {
    RefuseBlock(target, pages.begin, block, "cannot be read (EIO) at");
    return {};
  }
  if (error != 0) return SystemError(error, fmt::format("cannot read {}", image.path));
  if (!verify) return {};
  // SAFETY: the bytes just read into memory of ours.
  const std::span bytes(reinterpret_cast<const std::byte*>(into.value), kBlockSize);
  if (!image.layer->BlockMatches(block, bytes)) {
    // Memory given back takes its part of the mirror away, perhaps between read and hash: only what
    // nobody else can touch is proof.
    const std::span again(bounce_);
    // SAFETY: only handed to pread.
    const Vaddr bounce(reinterpret_cast<uint64_t>(bounce_.data()));
    stale_ = whole && ReadFileInto(image.fd, bounce, Bytes(kBlockSize), block) == 0 &&
             image.layer->BlockMatches(block, again);
    if (!stale_)
      RefuseBlock(target, pages.begin, block, "does not match its hash in the 64 KiB at");
    return {};
  }
  if (!whole) {
    const uint64_t skip = target.planned.area.OffsetOf(pages.begin).value - block.value;
    // SAFETY: staging memory of ours.
    std::copy_n(bytes.begin() + static_cast<ptrdiff_t>(skip), pages.size().value,
                reinterpret_cast<std::byte*>(to.value));
  }
  return {};
}

// The 2 MiB around `at` stay direct-mapped; where there are many such, all of the area from there.
void LocalCarrier::RefuseBlock(const Planned& target, Vaddr at, FileOffset offset,
                               const char* problem) {
  const VaddrRange area = target.planned.area.range;
  VaddrRange lost = VaddrRange{Vaddr(AlignDown(at.value, kHugePageSize)),
                               Vaddr(AlignDown(at.value, kHugePageSize) + kHugePageSize)}
                        .Intersect(area);
  if (share_->refusals() >= kRefusalsOfAnArea) lost.end = area.end;
  share_->Refuse(lost, fmt::format("{} {} offset {}: memory {} stays direct-mapped",
                                   target.image->path, problem, offset.value, lost));
  stale_ = true;
}

Result<> LocalCarrier::CopyOwn(VaddrRange pages, Vaddr to) {
  int error = ReadOwnMemory(to, pages);
  if (error == EFAULT) {
    // Not readable, perhaps: /proc/self/mem reads it all the same. Otherwise unmapped meanwhile.
    error = ReadFileInto(share_->watcher().fds().memory, to, pages.size(),
                         FileOffset(pages.begin.value));
  }
  if (error == EFAULT || error == EIO || error == ENODATA) {
    stale_ = true;
    return {};
  }
  if (error != 0) return SystemError(error, fmt::format("cannot copy {}", pages));
  return {};
}

Result<> LocalCarrier::CopyAgain(size_t index, std::span<const VaddrRange> pages) {
  for (const VaddrRange range : pages) {
    UNMOOR_TRY(CopyOwn(range, plan_[index].At(range.begin)));
  }
  return {};
}

// --- windows ------------------------------------------------------------------------------------

WindowPiece LocalCarrier::PieceOf(size_t index, VaddrRange range) const {
  const Planned& target = plan_[index];
  const Area& area = target.planned.area;
  return {range.begin.value,
          range.end.value,
          target.At(range.begin).value,
          DeviceOf(area),
          area.inode,
          area.OffsetOf(range.begin).value,
          static_cast<uint32_t>(area.prot)};
}

// In ns. Three quarters of the pause for the threads to come, the rest for recheck and swap. A
// machine under load may not get every thread onto a core that soon; rather than never finishing,
// the time grows.
int64_t LocalCarrier::StopLimit() const {
  const int64_t first = options_.max_pause.value * 3 / 4;
  return std::max(first, std::min(kLongestStop, first << std::min(lateness_ / 2, 12)));
}

Result<SwapOutcome> LocalCarrier::Swap(std::span<const Piece> pieces, PageCount dirty_limit) {
  if (MonotonicNow() - last_pin_check_ > kPinCheckInterval) UNMOOR_TRY(CheckNoPinnedMemory());
  frozen_pieces_.clear();
  guarded_pieces_.clear();
  for (const Piece& piece : pieces) {
    if (!plan_[piece.area].guarded) {
      frozen_pieces_.push_back(PieceOf(piece.area, piece.range));
      continue;
    }
    for (const VaddrRange block : CutIntoBlocks(piece.range)) {
      guarded_pieces_.push_back(PieceOf(piece.area, block));
    }
  }
  UNMOOR_TRY(FaultPoint("local.before_swap"));
  if (!guarded_pieces_.empty()) {
    UNMOOR_ASSIGN(const SwapOutcome outcome, SwapGuardedPieces(guarded_pieces_, dirty_limit));
    if (outcome.result != SwapResult::kSwapped || frozen_pieces_.empty()) return outcome;
  }
  const WindowResult result = SwapFrozen(share_->watcher().fds(), frozen_pieces_.data(),
                                         static_cast<uint32_t>(frozen_pieces_.size()),
                                         dirty_limit.value, StopLimit(), *room_);
  auto outcome = Conclude(result);
  if (outcome && result.skipped && outcome->result == SwapResult::kSwapped) {
    for (const WindowPiece& piece : frozen_pieces_) {
      const Vaddr mirror(piece.mirror);
      (void)AdviseOwn({mirror, mirror + Bytes(piece.end - piece.begin)}, MADV_DONTNEED);
    }
  }
  return outcome;
}

Result<SwapOutcome> LocalCarrier::SwapGuardedPieces(std::span<const WindowPiece> pieces,
                                                    PageCount dirty_limit) {
  SwapOutcome all;
  all.result = SwapResult::kSwapped;
  for (const WindowPiece& piece : pieces) {
    const WindowResult result =
        SwapGuarded(share_->watcher().fds(), piece, dirty_limit.value, StopLimit(), *room_);
    longest_guard_ = std::max(longest_guard_, Nanos(result.guard_ns));
    if (result.outcome == WindowResult::kUnguardable) {
      frozen_pieces_.push_back(piece);
      continue;
    }
    const bool untouched = result.guard_ns == 0;
    if (untouched && result.outcome == WindowResult::kSwapped) continue;  // done before, or gone
    UNMOOR_ASSIGN(const SwapOutcome outcome, Conclude(result));
    all.recopied += outcome.recopied;
    all.pause = std::max(all.pause, outcome.pause);
    all.result = outcome.result;
    if (outcome.result != SwapResult::kSwapped) return all;
  }
  return all;
}

Result<SwapOutcome> LocalCarrier::Conclude(const WindowResult& result) {
  SwapOutcome outcome;
  outcome.pause = Nanos(result.pause_ns);
  outcome.recopied = PageCount(result.recopied);
  if (result.outcome != WindowResult::kBusy) {
    busy_since_ = Nanos();
    lateness_ = std::max(lateness_ - 1, 0);  // as it was for this window, it is for the next
  }
  switch (result.outcome) {
    case WindowResult::kSwapped:
      outcome.result = SwapResult::kSwapped;
      return outcome;
    case WindowResult::kTooDirty:
      outcome.result = SwapResult::kTooDirty;
      return outcome;
    case WindowResult::kStale:
      outcome.result = SwapResult::kStale;
      return outcome;
    case WindowResult::kFailed:
      return SystemError(result.error, "cannot swap a batch");
    case WindowResult::kBusy:
    case WindowResult::kUnguardable:
      break;
  }
  lateness_ += 3;
  if (busy_since_.value == 0) busy_since_ = MonotonicNow();
  // A window in vain stops the program as a good one does; it shall run for most of the time.
  SleepFor(Nanos(kRestAfterVain * result.pause_ns));
  if (MonotonicNow() - busy_since_ > kPatience) {
    busy_since_ = MonotonicNow();  // the patience stays
    return Errno(EBUSY, fmt::format("thread {} does not come to rest: it sleeps in the kernel, or "
                                    "has the freeze signal blocked",
                                    result.late_thread));
  }
  outcome.result = SwapResult::kBusy;
  return outcome;
}

}  // namespace unmoor::local
