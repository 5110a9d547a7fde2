// The worker as Carrier of the batch state machine: plans, mirrors, copies, windows. See worker.h
// and remap/remapper.h.
#include "agent/worker.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <utility>

#include "agent/page_image.h"
#include "agent/worker_ops.h"
#include "base/fault_point.h"
#include "base/log.h"
#include "os/file.h"
#include "os/kernel_abi.h"
#include "os/kernel_features.h"
#include "os/limits.h"
#include "os/own_memory.h"
#include "os/pagemap.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/remote_memory.h"
#include "os/userfaultfd.h"

namespace unmoor {

void AddAdvice(OpList& ops, VaddrRange range, int advice) {
  ops.Syscall(SYS_madvise,
              {range.begin.value, range.size().value, static_cast<uint64_t>(advice), 0, 0, 0});
}

namespace {

constexpr size_t kSpareMaps = 128;  // what the remap may need for itself
constexpr Nanos kPinCheckInterval(50'000'000);
constexpr int kPlanAttempts = 1000;
constexpr unsigned long kOpenDirect = 040000;  // O_DIRECT
constexpr int kBusyBeforeHold = 2;             // with an event waiting
constexpr int kBusyBeforeHoldInAnyCase = 10;
constexpr int kPlansBeforeHold = 10;
constexpr size_t kUnusedMirrors = 64;
constexpr size_t kRefusals = 64;  // damaged pieces of memory, each a mapping of its own
constexpr Nanos kSwapDeadline(250'000'000);
constexpr uint64_t kAdviceCollapse = 25;  // MADV_COLLAPSE, from 6.1
constexpr uint64_t kNoAdvice = ~0U;       // what an older kernel takes it for
// Where helpers' memory goes: far from where programs and the kernel put theirs.
constexpr uint64_t kLowestOwned = uint64_t{1} << 44;
constexpr uint64_t kHighestOwned = uint64_t{1} << 46;

uint64_t ToDevice(uint32_t major, uint32_t minor) {
  return uint64_t{major} << 32 | minor;
}

Area Cut(const Area& area, VaddrRange part) {
  Area cut = area;
  cut.offset = area.OffsetOf(part.begin).value;
  cut.range = part;
  return cut;
}

// What of `area` shows `file`, which may lie beyond it on either side.
VaddrRange AddressesOf(const Area& area, FileRange file) {
  const auto at = [&](FileOffset offset) {
    const auto distance = static_cast<int64_t>(offset.value - area.offset);
    const auto size = static_cast<int64_t>(area.range.size().value);
    return area.range.begin + Bytes(static_cast<uint64_t>(std::clamp(distance, int64_t{0}, size)));
  };
  return {at(file.begin), at(file.end)};
}

// By the line "flags:", octal.
bool IsOpenDirect(const std::string& fdinfo) {
  const auto text = ReadFile(fdinfo);
  const size_t at = text ? text->find("flags:") : std::string::npos;
  return at != std::string::npos &&
         (std::strtoul(text->c_str() + at + 6, nullptr, 8) & kOpenDirect) != 0;
}

}  // namespace

Result<std::vector<Carrier::PlannedArea>> Worker::Plan() {
  stop_.Release();
  swap_next_ = false;
  UNMOOR_TRY(CheckNoPinnedMemory());
  memory_room_.FindGroups();
  // The helper's are those of when it was made; what is mapped counts for the program.
  CopyMemoryLimits(pid_, link_.helper().pid);
  if (++plans_in_a_row_ > kPlansBeforeHold) UNMOOR_TRY(ConvertHot());
  UNMOOR_TRY(Settle());
  for (int attempt = 0;; ++attempt) {
    auto planned = PlanOnce();
    if (planned) return planned;
    // The program runs: what was read a moment ago may be unmapped or mapped over by now.
    const int errnum = planned.error().errnum();
    const bool changed_meanwhile = errnum == EINVAL || errnum == ENOENT;
    if (!changed_meanwhile || attempt == kPlanAttempts || program_ended()) return planned;
    UNMOOR_TRY(HandleEvents());
    UNMOOR_TRY(Settle());
  }
}

Result<std::vector<Carrier::PlannedArea>> Worker::PlanOnce() {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadSmaps(pid_));
  RememberImages(vmas);
  if (CanNameMemory()) names_.Learn(images_);
  if (vmas.size() + kSpareMaps > MaxMapCount()) {
    return Failure(Error(ErrorKind::kMachine, ENOMEM,
                         fmt::format("the program has {} of the {} mappings it may have; raise "
                                     "vm.max_map_count",
                                     vmas.size(), MaxMapCount())));
  }
  UNMOOR_TRY(RegisterAreas(vmas));
  areas_.clear();
  for (Area& area : FindAreas(vmas, MapsPageImage, dropped_)) {
    UNMOOR_ASSIGN(PlannedArea planned, PlanArea(std::move(area)));
    UNMOOR_TRY(RefuseLost(planned));
    for (const VaddrRange part : refused_.Outside(planned.area.range)) {
      areas_.push_back({Cut(planned.area, part), planned.image_data});
    }
  }
  UNMOOR_TRY(FreeMirrors());
  stale_ = false;
  spdlog::debug("plan: {} areas", areas_.size());
  return areas_;
}

Result<Carrier::PlannedArea> Worker::PlanArea(Area area) {
  UNMOOR_ASSIGN(const ImageFile* file, FileOf(area));
  UNMOOR_TRY(MirrorFor(area));
  return PlanData(std::move(area), file->fd.get());
}

Result<Carrier::PlannedArea> Worker::PlanData(Area area, int file) {
  const FileOffset begin(
      static_cast<uint64_t>(std::max<int64_t>(0, static_cast<int64_t>(area.offset))));
  UNMOOR_ASSIGN(const std::vector<FileRange> data,
                DataRanges(file, {begin, area.OffsetOf(area.range.end)}, "page image"));
  PlannedArea planned{std::move(area), {}};
  for (const FileRange& range : data) {
    const auto at = [&](FileOffset offset) {
      return planned.area.range.begin + Bytes(offset.value - planned.area.offset);
    };
    planned.image_data.Insert({at(range.begin), at(range.end)});
  }
  return planned;
}

// What the image has lost: behind its end, and where there is a hole now. Neither shows when data
// is copied, since there is none.
Result<> Worker::RefuseLost(const PlannedArea& planned) {
  const Area& area = planned.area;
  UNMOOR_ASSIGN(ImageFile * file, FileOf(area));
  const FileRange shown{
      FileOffset(static_cast<uint64_t>(std::max<int64_t>(0, static_cast<int64_t>(area.offset)))),
      area.OffsetOf(area.range.end)};
  std::vector<FileRange> data;
  for (const VaddrRange part : planned.image_data.Inside(area.range)) {
    data.push_back({area.OffsetOf(part.begin), area.OffsetOf(part.end)});
  }
  FileRange rest = shown;
  if (const auto truncated = file->check.Truncated(shown.end)) {
    Refuse(area, *truncated);
    rest = shown.Intersect({FileOffset(0), truncated->block.begin});
  }
  UNMOOR_ASSIGN(const std::vector<LayerCheck::Damage> lost, file->check.Lost(rest, data));
  for (const LayerCheck::Damage& damage : lost) {
    UNMOOR_ASSIGN(const bool wanted, ShowsImage(AddressesOf(area, damage.block)));
    if (wanted) Refuse(area, damage);
  }
  return {};
}

// Whether any page of `range` is the image's: neither written nor given back by the program.
Result<bool> Worker::ShowsImage(VaddrRange range) const {
  UNMOOR_ASSIGN(const std::vector<VaddrRange> own,
                ScanPages(pagemap_.get(), range, PageQuery::kOwn, false));
  RangeSet known = dropped_;
  for (const VaddrRange part : own) known.Insert(part);
  return known.SizeWithin(range) < range.size();
}

// Where there are many such, all of the area from there.
void Worker::Refuse(const Area& area, const LayerCheck::Damage& damage) {
  VaddrRange range = AddressesOf(area, damage.block);
  if (refusals_ >= kRefusals) range.end = area.range.end;
  std::vector<VaddrRange> fresh;
  for (const VaddrRange part : dropped_.Outside(range)) {
    for (const VaddrRange unknown : refused_.Outside(part)) fresh.push_back(unknown);
  }
  if (fresh.empty()) return;
  for (const VaddrRange part : fresh) refused_.Insert(part);
  stale_ = true;
  const std::string text =
      fmt::format("{}; memory {} (of {}) of process {} ({}) stays mapped from it for good",
                  damage.what, range, area.file_vma, pid_.value, name_);
  spdlog::warn("{}", text);
  if (refusals_++ == 0) damage_ = text;
}

// Memory that devices or the kernel write to behind the page tables cannot be moved safely, and
// nothing tells which it is; so a program with asynchronous I/O set up is left alone. Synchronous
// transfers (O_DIRECT) have ended by the time their threads are stopped, but may have written,
// unseen, to pages whose baseline was set while they were under way.
Result<> Worker::CheckNoPinnedMemory() {
  const Nanos began = MonotonicNow();
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid_));
  for (const VmaInfo& vma : vmas) {
    if (vma.name.starts_with("/[aio]")) {
      return Failure(Error(ErrorKind::kMachine, EBUSY,
                           "the program uses Linux AIO, whose buffers must not move; close it"));
    }
  }
  const std::string directory = fmt::format("/proc/{}/fd", pid_.value);
  UNMOOR_ASSIGN(const std::vector<std::string> fds, ListDirectory(directory));
  for (const std::string& fd : fds) {
    const auto target = ReadLink(directory + "/" + fd);
    if (target && *target == "anon_inode:[io_uring]") {
      return Failure(Error(ErrorKind::kMachine, EBUSY,
                           "the program uses io_uring, whose buffers must not move; close it"));
    }
    if (!direct_io_ && target && target->starts_with("/")) {
      direct_io_ = IsOpenDirect(fmt::format("/proc/{}/fdinfo/{}", pid_.value, fd));
    }
  }
  const Nanos now = MonotonicNow();
  next_pin_check_ = now + std::max(kPinCheckInterval, Nanos((now - began).value * 10));
  return {};
}

Result<Worker::ImageFile*> Worker::FileOf(const VmaInfo& vma) {
  Area area;
  area.inode = vma.inode;
  area.dev_major = vma.dev_major;
  area.dev_minor = vma.dev_minor;
  area.file_vma = vma.range;
  return FileOf(area);
}

Result<Worker::ImageFile*> Worker::FileOf(const Area& area) {
  ImageFile& file = files_[{ToDevice(area.dev_major, area.dev_minor), area.inode}];
  if (!file.fd.valid()) {
    UNMOOR_ASSIGN(file.fd, OpenFile(fmt::format("/proc/{}/map_files/{:x}-{:x}", pid_.value,
                                                area.file_vma.begin.value, area.file_vma.end.value),
                                    O_RDONLY));
    UNMOOR_ASSIGN(file.helper_fd, link_.GiveFd(file.fd.get()));
    const auto mapping = std::ranges::find_if(images_, [&](const VmaInfo& vma) {
      return vma.inode == area.inode && vma.dev_major == area.dev_major &&
             vma.dev_minor == area.dev_minor;
    });
    file.check =
        LayerCheck(file.fd.get(), mapping == images_.end() ? VmaInfo() : *mapping, options_.verify);
    if (const std::string& why = file.check.unchecked(); !why.empty()) {
      spdlog::info("process {}: what is copied is not held against hashes: {}", pid_.value, why);
    }
  }
  return &file;
}

// A hole of the program's address space, mapped for us and recorded as ours.
Result<Vaddr> Worker::MapOwned(Bytes length, uint64_t congruent_to, bool no_reserve) {
  const auto free_slot = std::ranges::find_if(owned_, &VaddrRange::empty);
  const auto slot = static_cast<size_t>(free_slot - owned_.begin());
  if (slot == helper::kMaxOwned) return MachineError("too many separate areas to remap");
  for (int attempt = 0; attempt < 16; ++attempt) {
    UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid_));
    const uint64_t remainder = congruent_to % kHugePageSize;
    uint64_t at = kLowestOwned + remainder;
    for (const VmaInfo& vma : vmas) {
      if (vma.range.end.value <= at) continue;
      if (vma.range.begin.value >= at + length.value) break;
      at = AlignUp(vma.range.end.value, kHugePageSize) + kHugePageSize + remainder;
    }
    if (at + length.value > kHighestOwned) return MachineError("no room in the address space");
    OpList map;
    map.Syscall(SYS_mmap, {at, length.value, PROT_READ | PROT_WRITE,
                           static_cast<uint64_t>(MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE |
                                                 (no_reserve ? MAP_NORESERVE : 0)),
                           ~uint64_t{0}, 0});
    UNMOOR_ASSIGN(const helper::Reply reply, link_.Run(map));
    if (reply.error == EEXIST) continue;  // the program was quicker
    if (reply.error != 0) {
      return SystemError(reply.error, fmt::format("no memory for {} of staging inside the program",
                                                  HumanBytes(length)));
    }
    const Vaddr base(at);
    if (slot == owned_.size()) owned_.emplace_back();
    owned_[slot] = {base, base + length};
    UNMOOR_TRY(RecordOwned(slot));
    OpList keep;
    AddAdvice(keep, owned_[slot], MADV_DONTFORK);
    UNMOOR_TRY(link_.Must(keep, "madvise(MADV_DONTFORK) inside the program"));
    return base;
  }
  return MachineError("the program keeps taking the address space meant for staging");
}

// Where whoever comes after a crash finds what to unmap.
Result<> Worker::RecordOwned(size_t slot) {
  const helper::OwnedRange record{owned_[slot].begin.value, owned_[slot].size().value};
  const uint64_t count = owned_.size();
  const Vaddr data = link_.helper().region + Bytes(helper::kCodeSize);
  // Through the helper: the program may have called exec and be another by now.
  const Pid carrier = link_.helper().pid;
  UNMOOR_TRY(WriteMemory(carrier,
                         data + Bytes(offsetof(helper::Data, owned) + slot * sizeof(record)),
                         std::as_bytes(std::span(&record, 1))));
  return WriteMemory(carrier, data + Bytes(offsetof(helper::Data, owned_count)),
                     std::as_bytes(std::span(&count, 1)));
}

// A program that moves its memory about leaves mirrors behind that no area of the plan has.
Result<> Worker::FreeMirrors() {
  if (mirrors_.size() < areas_.size() + kUnusedMirrors) return {};
  std::set<const Mirror*> used;
  for (size_t i = 0; i < areas_.size(); ++i) used.insert(&MirrorOf(i));
  std::vector<Mirror> kept;
  for (const Mirror& mirror : mirrors_) {
    if (used.contains(&mirror)) {
      kept.push_back(mirror);
      continue;
    }
    UNMOOR_TRY(ReleaseMirror(mirror));
  }
  mirrors_ = std::move(kept);
  return {};
}

Result<> Worker::ReleaseMirror(const Mirror& mirror) {
  const VaddrRange range{mirror.base, mirror.base + mirror.area.range.size()};
  const auto it = std::ranges::find(owned_, range);
  UNMOOR_CHECK(it != owned_.end());
  *it = {};
  UNMOOR_TRY(RecordOwned(static_cast<size_t>(it - owned_.begin())));
  OpList unmap;
  unmap.Syscall(SYS_munmap, {range.begin.value, range.size().value, 0, 0, 0, 0});
  return link_.Must(unmap, "munmap inside the program").map([](int64_t) {});
}

// At most one name a list: it is read from the helper's memory when the list runs.
Result<> Worker::AddName(OpList& ops, VaddrRange range, const std::string& name) const {
  if (name.empty()) return {};
  const Vaddr text =
      link_.helper().region + Bytes(helper::kCodeSize + offsetof(helper::Data, directory_entries));
  UNMOOR_TRY(WriteMemory(link_.helper().pid, text,
                         std::as_bytes(std::span(name.c_str(), name.size() + 1))));
  ops.Syscall(SYS_prctl,
              {kPrSetVma, kPrSetVmaAnonName, range.begin.value, range.size().value, text.value, 0},
              true);
  return {};
}

// One mirror for each area, kept as long as the area lasts: pages moved from one mirror to one area
// are one VMA afterwards.
Result<const Worker::Mirror*> Worker::MirrorFor(const Area& area) {
  for (const Mirror& mirror : mirrors_) {
    if (mirror.area.range.Contains(area.range) && mirror.area.inode == area.inode &&
        mirror.area.prot == area.prot &&
        mirror.area.OffsetOf(area.range.begin).value == area.offset) {
      return &mirror;
    }
  }
  UNMOOR_ASSIGN(const Vaddr base,
                MapOwned(area.range.size(), area.range.begin.value, area.HasFlag("nr")));
  // Touching its first page gives the whole mirror one anon_vma before it is ever split; without
  // that the pieces could not join again.
  OpList prepare;
  const Vaddr data = link_.helper().region + Bytes(helper::kCodeSize);
  prepare.Copy(base, {data, data + Bytes(8)});
  AddAdvice(prepare, {base, base + std::min(area.range.size(), Bytes(kHugePageSize))},
            MADV_DONTNEED);
  for (const FlagAdvice& f : kFlagAdvice) {
    if (f.advice != MADV_DONTFORK && area.HasFlag(f.flag)) {
      AddAdvice(prepare, {base, base + area.range.size()}, f.advice);
    }
  }
  const auto shown = std::ranges::find(images_, area.file_vma, &VmaInfo::range);
  if (shown != images_.end()) {
    const FileOffset offset = area.OffsetOf(area.file_vma.begin);
    UNMOOR_TRY(AddName(prepare, {base, base + area.range.size()}, names_.At(shown->name, offset)));
  }
  UNMOOR_TRY(link_.Must(prepare, "cannot prepare staging memory"));
  mirrors_.push_back({area, base});
  return &mirrors_.back();
}

const Worker::Mirror& Worker::MirrorOf(size_t index) const {
  if (index == 0 && put_back_mirror_) return *put_back_mirror_;
  const Area& area = areas_[index].area;
  const auto it = std::ranges::find_if(mirrors_, [&](const Mirror& mirror) {
    return mirror.area.range.Contains(area.range) && mirror.area.inode == area.inode &&
           mirror.area.prot == area.prot &&
           mirror.area.OffsetOf(area.range.begin).value == area.offset;
  });
  UNMOOR_CHECK(it != mirrors_.end());
  return *it;
}

Result<std::vector<VaddrRange>> Worker::OwnPages(VaddrRange range, bool written_only) {
  auto pages = ScanPages(pagemap_.get(), range,
                         written_only ? PageQuery::kOwnWritten : PageQuery::kOwn, true);
  if (!pages) {
    if (program_ended()) return Failure(pages.error());
    stale_ = true;  // part of the range is no longer what was registered
    return std::vector<VaddrRange>();
  }
  return pages;
}

// Copies that were made and not swapped yet are given up where there is no room for the rest: the
// program needs the memory more than we do.
Result<> Worker::TakeMemory(std::span<const CopyStep> steps) {
  Bytes size;
  for (const CopyStep& step : steps) size += step.content.size();
  auto taken = memory_room_.Take(size);
  if (taken) return {};
  for (const Mirror& mirror : mirrors_) {
    OpList forget;
    AddAdvice(forget, {mirror.base, mirror.base + mirror.area.range.size()}, MADV_DONTNEED);
    UNMOOR_TRY(link_.Must(forget, "madvise(MADV_DONTNEED) inside the program"));
  }
  return Failure(std::move(taken).error());
}

Result<> Worker::EnsureScratch() {
  if (scratch_.value != 0) return {};
  UNMOOR_ASSIGN(scratch_, MapOwned(Bytes(kHugePageSize), 0, false));
  OpList advise;
  AddAdvice(advise, {scratch_, scratch_ + Bytes(kHugePageSize)}, MADV_HUGEPAGE);
  UNMOOR_TRY(link_.Must(advise, "madvise(MADV_HUGEPAGE) inside the program"));
  return {};
}

Result<> Worker::Copy(size_t index, std::span<const CopyStep> steps) {
  UNMOOR_TRY(TakeMemory(steps));
  return CopySteps(index, steps);
}

Result<> Worker::CopySteps(size_t index, std::span<const CopyStep> steps) {
  const Area& area = areas_[index].area;
  const Mirror& mirror = MirrorOf(index);
  UNMOOR_ASSIGN(ImageFile * file, FileOf(area));
  bool looked = false;
  Result<> checked;
  const auto look = [&] {
    if (!std::exchange(looked, true)) checked = CheckSteps(area, file->check, steps);
  };
  OpList ops;
  // A block copied before and given back, or of an earlier plan, starts afresh.
  AddAdvice(ops, {mirror.At(steps.front().block.begin), mirror.At(steps.back().block.end)},
            MADV_DONTNEED);
  UNMOOR_TRY(RunCopies(ops));
  ops.clear();
  VaddrRange huge_span;
  for (const CopyStep& step : steps) {
    if (!step.huge) continue;
    if (huge_span.empty()) huge_span.begin = step.block.begin;
    huge_span.end = step.block.end;
    UNMOOR_TRY(EnsureScratch());
    AddHugeBlock(ops, area, mirror, file->helper_fd, step);
  }
  if (!huge_span.empty()) {
    const VaddrRange staging{mirror.At(huge_span.begin), mirror.At(huge_span.end)};
    if (can_move_) UNMOOR_TRY(UffdRegister(staging_.get(), staging, UffdMode::kMissing));
    const auto copied = RunCopies(ops, look);
    if (can_move_) UNMOOR_TRY(UffdUnregister(staging_.get(), staging));
    UNMOOR_TRY(copied);
    ops.clear();
  }
  for (const CopyStep& step : steps) {
    if (!step.huge) AddPages(ops, area, mirror, file->helper_fd, step.content);
  }
  UNMOOR_TRY(RunCopies(ops, look));
  return checked;
}

// Beside the helper, which copies the same pages of the page cache: nothing of it is swapped in
// before both are done. What the program has written since does not come from the layer.
Result<> Worker::CheckSteps(const Area& area, LayerCheck& check, std::span<const CopyStep> steps) {
  if (!check.unchecked().empty()) return {};
  FileOffset checked;
  for (const CopyStep& step : steps) {
    for (const VaddrRange pages : step.content.image) {
      const FileRange range{area.OffsetOf(pages.begin), area.OffsetOf(pages.end)};
      UNMOOR_ASSIGN(const std::vector<LayerCheck::Damage> found, check.Look(range, checked));
      for (const LayerCheck::Damage& damage : found) Refuse(area, damage);
      verified_ += pages.size();
    }
  }
  return {};
}

// A whole block by way of the scratch block (UFFDIO_MOVE gives its huge page away); without
// UFFDIO_MOVE by collapsing the block in the mirror first.
void Worker::AddHugeBlock(OpList& ops, const Area& area, const Mirror& mirror, int file,
                          const CopyStep& step) const {
  const Vaddr target = mirror.At(step.block.begin);
  const Vaddr at = can_move_ ? scratch_ : target;
  if (!can_move_) {
    const Vaddr data = link_.helper().region + Bytes(helper::kCodeSize);
    ops.Copy(target, {data, data + Bytes(8)});
    const uint64_t advice = FaultPoint("kernel.collapse") ? kAdviceCollapse : kNoAdvice;
    ops.Syscall(SYS_madvise, {target.value, kHugePageSize, advice, 0, 0, 0}, true);
  }
  for (const VaddrRange pages : step.content.image) {
    ops.Pread(file, at + (pages.begin - step.block.begin), pages.size(),
              area.OffsetOf(pages.begin));
  }
  for (const VaddrRange pages : step.content.own) {
    AddOwnPages(ops, area, at + (pages.begin - step.block.begin), pages);
  }
  if (can_move_) ops.Move(helper_staging_, target, scratch_, Bytes(kHugePageSize));
}

void Worker::AddPages(OpList& ops, const Area& area, const Mirror& mirror, int file,
                      const BlockContent& content) const {
  for (const VaddrRange pages : content.image) {
    ops.Pread(file, mirror.At(pages.begin), pages.size(), area.OffsetOf(pages.begin));
  }
  for (const VaddrRange pages : content.own) {
    AddOwnPages(ops, area, mirror.At(pages.begin), pages);
  }
}

void Worker::AddOwnPages(OpList& ops, const Area& area, Vaddr to, VaddrRange pages) const {
  if ((area.prot & PROT_READ) != 0) {
    ops.Copy(to, pages);
  } else {
    ops.Pread(helper_memory_, to, pages.size(), FileOffset(pages.begin.value));
  }
}

Result<> Worker::RunCopies(const OpList& ops, const std::function<void()>& meanwhile) {
  if (ops.size() == 0) return {};
  UNMOOR_ASSIGN(const helper::Reply reply, link_.RunBeside(ops, meanwhile));
  const bool unreadable = reply.error == ENODATA || reply.error == EIO;
  if (unreadable && stale_) return {};  // known by now, and refused
  switch (reply.error) {
    case 0:
      return {};
    case EFAULT:
      stale_ = true;  // unmapped or made unreadable meanwhile
      return {};
    case ENODATA:
      return MachineError("the page image is shorter than it was when it was mapped");
    default:
      return SystemError(reply.error, "cannot copy pages inside the program");
  }
}

Result<> Worker::CopyAgain(size_t index, std::span<const VaddrRange> pages) {
  const Mirror& mirror = MirrorOf(index);
  OpList ops;
  for (const VaddrRange range : pages) {
    AddOwnPages(ops, areas_[index].area, mirror.At(range.begin), range);
  }
  return RunCopies(ops);
}

bool Worker::IsKnownImage(const VmaInfo& vma) const {
  return vma.inode != 0 && !vma.shared && std::ranges::any_of(images_, [&](const VmaInfo& image) {
           return image.inode == vma.inode && image.dev_major == vma.dev_major &&
                  image.dev_minor == vma.dev_minor;
         });
}

// What the window must find unchanged. False when it is not what was planned already.
Result<bool> Worker::AddChecks(OpList& ops, const Piece& piece) const {
  const Area& area = areas_[piece.area].area;
  // What was given back may be in the mirror, and would come back to life.
  if (put_back_mirror_ && touched_.SizeWithin(piece.range) > Bytes(0)) return false;
  for (Vaddr at = piece.range.begin; at < piece.range.end;) {
    UNMOOR_ASSIGN(const auto vma, QueryVma(maps_.get(), at));
    if (!vma || vma->range.begin > at || vma->shared || vma->prot != area.prot) return false;
    const VaddrRange part = vma->range.Intersect({at, piece.range.end});
    const uint64_t offset = area.OffsetOf(at).value;
    if (vma->inode == 0) {
      if (dropped_.SizeWithin(part) != part.size()) return false;
    } else if (vma->inode != area.inode ||
               (vma->offset + (at - vma->range.begin)).value != offset) {
      return false;
    }
    ops.CheckVma(helper_maps_, part, area.prot, vma->inode, offset, vma->dev_major, vma->dev_minor);
    at = part.end;
  }
  return true;
}

void Worker::AddSwap(OpList& ops, const Piece& piece) const {
  const Area& area = areas_[piece.area].area;
  const Vaddr mirror = MirrorOf(piece.area).At(piece.range.begin);
  const uint64_t length = piece.range.size().value;
  if (!area.HasFlag("dc")) {
    AddAdvice(ops, {mirror, mirror + piece.range.size()}, MADV_DOFORK);
  }
  if (area.prot != (PROT_READ | PROT_WRITE)) {
    ops.Syscall(SYS_mprotect, {mirror.value, length, static_cast<uint64_t>(area.prot), 0, 0, 0});
  }
  // What is put back is watched from its first moment, which a registration moves along with.
  const auto register_mirror = [&](unsigned long request, uint64_t mode) {
    if (put_back_mirror_ && piece.area == 0)
      ops.Ioctl(helper_uffd_, request, {mirror.value, length, mode, 0, 0});
  };
  register_mirror(UFFDIO_REGISTER, UFFDIO_REGISTER_MODE_WP);
  // DONTUNMAP keeps our hold on the mirror's addresses, so that cleaning up never unmaps something
  // the program put there.
  ops.Syscall(SYS_mremap,
              {mirror.value, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | 4 /*MREMAP_DONTUNMAP*/,
               piece.range.begin.value, 0});
  register_mirror(UFFDIO_UNREGISTER, 0);
  if (!area.HasFlag("dc")) {
    AddAdvice(ops, {mirror, mirror + piece.range.size()}, MADV_DONTFORK);
  }
}

// Runs a list with swaps. What a swap replaces stays watched to the last, so the helper waits in
// mremap for us to read the event of what it unmapped. All threads of the program are stopped then,
// so the event is the helper's; before and after, one belongs to a thread of the program and stays.
Result<helper::Reply> Worker::RunSwaps(const OpList& ops) {
  const Urgent urgent;
  return link_.RunReading(ops, uffd_.get(), [&]() -> Result<> {
    if (!SleepsInCall(link_.helper().pid, SYS_mremap)) {
      SleepFor(Nanos(10'000));
      return {};
    }
    UNMOOR_TRY(ReadUffdEvent(uffd_.get()));
    return {};
  });
}

// Of many threads that fork or give memory back one always waits for its event to be read, or for
// the child of a vfork, and does not stop within a window: then the program is held first, with
// more patience, its events handled, and the window follows at once.
Result<SwapOutcome> Worker::Swap(std::span<const Piece> pieces, PageCount dirty_limit) {
  UNMOOR_ASSIGN(const bool waiting, WaitReadable(uffd_.get(), Nanos(0)));
  if (busy_in_a_row_ < (waiting ? kBusyBeforeHold : kBusyBeforeHoldInAnyCase)) {
    return SwapInWindow(pieces, dirty_limit);
  }
  Result<SwapOutcome> outcome;  // busy
  swap_next_ = !MayHold();      // not for events once more
  if (swap_next_) return outcome;
  const Nanos began = MonotonicNow();
  bool changed = false;
  const auto held = HoldProgram(changed);
  if (!held && held.error().errnum() != EAGAIN) {
    outcome = Failure(held.error());
  } else if (changed || unsettled_) {
    outcome->result = SwapResult::kStale;
  } else if (held) {
    outcome = SwapInWindow(pieces, dirty_limit);
  }
  UNMOOR_TRY(ReleaseProgram());
  if (outcome) {
    outcome->pause = MonotonicNow() - began;
  }
  return outcome;
}

// Memory given back meanwhile is anonymous already; to make such read-only and writable again may
// fail where memory is accounted strictly, so those windows are freezes.
bool Worker::AddGuards(OpList& ops, std::span<const Piece> pieces) {
  if (options_.guard != GuardPolicy::kFault || pieces.size() > helper::kMaxGuards) return false;
  for (const Piece& piece : pieces) {
    if (dropped_.SizeWithin(piece.range).value > 0) return false;
  }
  if (!guard_.ready()) return false;
  for (const Piece& piece : pieces) {
    const int prot = areas_[piece.area].area.prot;
    if ((prot & PROT_WRITE) != 0) ops.GuardPiece(piece.range, prot);
  }
  return true;
}

Result<SwapOutcome> Worker::SwapInWindow(std::span<const Piece> pieces, PageCount dirty_limit) {
  SwapOutcome outcome;
  if (MonotonicNow() > next_pin_check_) UNMOOR_TRY(CheckNoPinnedMemory());
  // Three quarters of the pause for stopping the threads, the rest for recheck and swap. A machine
  // under load may not get every thread onto a core that soon; rather than never finishing, the
  // time for stopping grows to twice that.
  const int64_t patience = std::min(1 + busy_in_a_row_ / 4, 2);
  const Nanos stop_limit(options_.max_pause.value * 3 / 4 * patience);
  OpList ops;
  const bool guarded = AddGuards(ops, pieces);
  ops.Freeze(helper_tasks_, stop_limit, nested_, helper_uffd_, guarded);
  for (const Piece& piece : pieces) {
    UNMOOR_ASSIGN(const bool as_planned, AddChecks(ops, piece));
    if (!as_planned) {
      outcome.result = SwapResult::kStale;
      return outcome;
    }
  }
  if (guarded) ops.Guard(helper_tasks_, stop_limit);
  for (const Piece& piece : pieces) {
    ops.Recheck(helper_pagemap_, piece.range, MirrorOf(piece.area).At(piece.range.begin),
                dirty_limit, direct_io_);
  }
  ops.Deadline(kSwapDeadline);
  for (const Piece& piece : pieces) AddSwap(ops, piece);
  ops.Thaw();
  if (ops.size() > helper::kMaxOps) {
    outcome.result = SwapResult::kTooDirty;  // too many fragments: take a smaller batch
    return outcome;
  }
  UNMOOR_TRY(FaultPoint("remap.before_swap"));
  UNMOOR_ASSIGN(const helper::Reply reply, RunSwaps(ops));
  outcome.pause = Nanos(reply.pause_ns);
  spdlog::debug(
      "window: {} pieces, error {}, {} threads ({} ran on) stopped after {}, rechecked {} ({} "
      "pages), released {}",
      pieces.size(), reply.error, reply.threads, reply.guarded, HumanTime(Nanos(reply.stop_ns)),
      HumanTime(Nanos(reply.recheck_ns)), reply.copied, HumanTime(outcome.pause));
  outcome.recopied = PageCount(reply.copied);
  busy_in_a_row_ = reply.error == EBUSY ? busy_in_a_row_ + 1 : 0;
  switch (reply.error) {
    case 0:
      outcome.result = SwapResult::kSwapped;
      plans_in_a_row_ = 0;
      if (reply.guarded > 0) ++guard_.windows;
      for (const Piece& piece : pieces) dropped_.Erase(piece.range);
      break;
    case EBUSY:
      outcome.result = SwapResult::kBusy;
      break;
    case E2BIG:
      outcome.result = SwapResult::kTooDirty;
      break;
    case ESTALE:
    case EFAULT:
    case ENOENT:
    case EPERM:
      outcome.result = SwapResult::kStale;
      break;
    case EOVERFLOW:
      return MachineError("process {} has more than {} threads", pid_.value, helper::kMaxThreads);
    default:
      return SystemError(reply.error, "cannot swap a batch inside the program");
  }
  counts_.longest_pause = std::max(counts_.longest_pause, outcome.pause);
  return outcome;
}

void Worker::Pause(Nanos time) {
  // An event that may not be handled yet would end every wait at once.
  const Nanos now = MonotonicNow();
  if (now < next_hold_) return SleepFor(std::min(time, next_hold_ - now));
  (void)WaitReadable(uffd_.get(), time);
}

}  // namespace unmoor
