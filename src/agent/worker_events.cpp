// The worker between a program and the kernel: what fork, mremap, munmap and MADV_DONTNEED of
// direct- mapped memory must do for the program to see anonymous memory. See worker.h.
//
// A thread that causes an event sleeps in its system call until the event is read. Wherever its
// effect can be made before that, it is; otherwise all threads are held first.
#include "agent/worker.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <optional>
#include <utility>

#include "agent/page_image.h"
#include "agent/worker_ops.h"
#include "base/fault_point.h"
#include "base/log.h"
#include "os/file.h"
#include "os/kernel_abi.h"
#include "os/pagemap.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/remote_memory.h"
#include "os/userfaultfd.h"

namespace unmoor {
namespace {

constexpr Bytes kConvertAtOnce(uint64_t{32} << 20);
constexpr Bytes kHeapReach(uint64_t{1} << 40);
// How long all threads may be held for the sake of one that does not stop (kFirstHold to begin
// with), and how many times that long the program then runs before it is held again.
constexpr Nanos kLongestHold(100'000'000);
// A mapping that was shortened must not grow again before it is anonymous: it would show old bytes.
constexpr Nanos kLongestHoldForCut(2'000'000'000);
constexpr Nanos kLongestHoldOfStarved(60'000'000'000);
constexpr int64_t kRunsAfterHoldInVain = 3;
constexpr Nanos kBirth(2'000'000);
constexpr int kHotAreas = 16;
constexpr Bytes kHotPart(uint64_t{2} << 20);
constexpr int kPlansBeforeLargeAreas = 50;
constexpr int kEventsAtOnce = 16;
constexpr int kBlindLooks = 20;
constexpr Nanos kSettleLimit(10'000'000'000);
constexpr Nanos kSettlePause(1'000'000);

// Its thread waits for the event to be read: one that still waits for the address space's lock
// would go by the range while it is not registered, and find the image.
bool GivesMemoryBack(const BlockedCall& call) {
  constexpr uint64_t kDontNeed = 4, kFree = 8, kDontNeedLocked = 24;
  return call.waits_for_event && call.number == SYS_madvise &&
         (call.args[2] == kDontNeed || call.args[2] == kFree || call.args[2] == kDontNeedLocked);
}

// The mremap that moved `range`: its thread sleeps in it, or is stopped at its end.
const BlockedCall* MoverOf(const ThreadCalls& calls, VaddrRange range) {
  const auto call = std::ranges::find_if(calls.blocked, [&](const BlockedCall& c) {
    return c.number == SYS_mremap && c.args[0] == range.begin.value;
  });
  return call == calls.blocked.end() ? nullptr : &*call;
}

bool GivesBirth(const BlockedCall& call) {
  return !call.waits_for_event && (call.number == SYS_clone || call.number == SYS_clone3);
}

bool Forks(const BlockedCall& call) {
  return call.number == SYS_fork || call.number == SYS_clone || call.number == SYS_clone3;
}

}  // namespace

Result<bool> Worker::HandleEvents() {
  if (asked_ && asked_()) return SystemError(ECANCELED, "asked to leave the program for a while");
  bool changed = std::exchange(stale_, false);
  if (swap_next_) return changed;
  // Bounded: threads that give memory back without pause always have the next event ready.
  for (int i = 0; i < kEventsAtOnce; ++i) {
    UNMOOR_ASSIGN(const bool waiting, WaitReadable(uffd_.get(), Nanos(0)));
    // A mapping known to be shortened may grow at any moment.
    if ((!waiting && cuts_.empty()) || !MayHold()) return changed;
    UNMOOR_ASSIGN(const ThreadCalls calls, ReadThreadCalls(pid_));
    // Before an event is read its thread still sleeps inside its system call, so what it asked for
    // can be made true first: killing us at any point leaves either the old state and the thread
    // waiting, or the new state.
    bool again = false;
    bool copied_again = false;
    for (const BlockedCall& call : calls.blocked) {
      if (!GivesMemoryBack(call)) continue;
      const uint64_t length = AlignUp(call.args[1], kPageSize);
      const VaddrRange range{Vaddr(call.args[0]), Vaddr(call.args[0] + length)};
      again = again || dropped_.SizeWithin(range).value != 0;
      copied_again = copied_again || MayCopyGivenBack(range);
      UNMOOR_TRY(Drop(range));
    }
    // With more than one thread, the event may be one's whose call we have not seen yet.
    const bool known = waiting && calls.threads == 1 && calls.blocked.size() == 1 &&
                       !copied_again && unreplaced_.empty() &&
                       (GivesMemoryBack(calls.blocked.front()) || Forks(calls.blocked.front()));
    if (!known) {
      const auto handled = HandleEventsStopped(changed);
      // A thread in a long vfork or disk transfer: the events wait, the other threads go on. What
      // was copied of memory whose event was read on the way is copied anew.
      if (!handled && handled.error().errnum() == EAGAIN) return changed || unsettled_;
      UNMOOR_TRY(handled);
      continue;
    }
    UNMOOR_TRY(KnowChildren());
    UNMOOR_ASSIGN(auto event, ReadUffdEvent(uffd_.get()));
    unsettled_ = unsettled_ || again;
    if (event) NoteEvent(*event, calls, changed);
  }
  return changed;
}

// Until a thread that gives back what it had given back before has run on, its pages are still
// there. Before anything of them can be copied it is past that: stopped, it is out of its call.
Result<> Worker::Settle() {
  const Nanos began = MonotonicNow();
  while (unsettled_ && !program_ended()) {
    bool changed = false;
    const auto held = HandleEventsStopped(changed);
    const bool late = !held && held.error().errnum() == EAGAIN;
    if (!late || MonotonicNow() - began > kSettleLimit) UNMOOR_TRY(held);
    if (late) SleepFor(kSettlePause);
  }
  return {};
}

bool Worker::MayHold() const {
  return MonotonicNow() >= next_hold_;
}

Result<> Worker::HandleEventsStopped(bool& changed) {
  const auto held = HoldProgram(changed);
  UNMOOR_TRY(ReleaseProgram());
  return held;
}

// Every thread stopped, every event read. With every thread asked to stop before an event is read,
// its thread gets no further than the end of its system call. Also after an error the caller must
// release.
Result<> Worker::HoldProgram(bool& changed) {
  HeldEvents events;
  held_since_ = MonotonicNow();
  const auto stopped = StopAndRead(events, changed);
  if (!events.unexplained.empty()) UNMOOR_TRY(ExplainMoves(events));
  // Whatever went wrong, what the events said happens before anybody runs.
  for (const VaddrRange range : events.given_back) UNMOOR_TRY(Drop(range));
  if (!unreplaced_.empty()) UNMOOR_TRY(ZeroUnreplaced(events.given_back));
  for (const VaddrRange range : events.grown) UNMOOR_TRY(ZeroGrowth(range));
  // But not what needs everybody to stand still: a thread that does not stop may be in a transfer,
  // or in a vfork, by which memory changes that is just being copied.
  for (const Vaddr end : events.cut) cuts_.insert(end.value);
  if (stopped) UNMOOR_TRY(ConvertCuts());
  // A thread that has not stopped may have its pages still to empty.
  unsettled_ = !stopped && (unsettled_ || !events.given_back.empty());
  // Follows the machine: where it is busy, threads need their time to stop.
  held_in_vain_ = !stopped;
  hold_limit_ = stopped ? std::max(Nanos(hold_limit_.value * 3 / 4), kFirstHold)
                        : std::min(Nanos(hold_limit_.value * 2), kLongestHold);
  return stopped;
}

Result<> Worker::StopAndRead(HeldEvents& events, bool& changed) {
  const Nanos began = MonotonicNow();
  for (int blind_looks = 0;;) {
    OpList hold;
    hold.Hold(helper_tasks_, Nanos(30'000), nested_);
    const auto late = link_.Must(hold, "cannot stop the program's threads");
    const bool all_asked = late || late.error().errnum() != EBUSY;
    if (all_asked) UNMOOR_TRY(late);
    if (all_asked && *late == 0) return {};
    // One that has not been asked to stop would run on once its event is read.
    UNMOOR_ASSIGN(const bool readable, WaitReadable(uffd_.get(), Nanos(0)));
    const bool waiting = readable && all_asked;
    const bool patient = !events.cut.empty() || !unreplaced_.empty();
    const Nanos limit = patient ? kLongestHoldForCut : hold_limit_;
    const Nanos held = MonotonicNow() - began;
    if (!waiting && held > limit) {
      // One that has only not had the CPU yet will stop. For cuts of before, another is not waited
      // for so long once more.
      const bool starved = (patient || !cuts_.empty()) && held < kLongestHoldOfStarved &&
                           ReadThreadCalls(pid_).value_or(ThreadCalls()).runnable > 0;
      if (starved) continue;
      return Failure(Error(ErrorKind::kMachine, EAGAIN,
                           fmt::format("a thread of process {} does not stop", pid_.value)));
    }
    if (!waiting) continue;
    UNMOOR_ASSIGN(const ThreadCalls calls, ReadThreadCalls(pid_));
    // The oldest event is that of a thread already asleep, unless the kernel doesn't tell.
    if (calls.waiting_for_event() == 0 && ++blind_looks < kBlindLooks) continue;
    // What is being born is not asked to stop. (One that waits for its vfork has given birth.)
    if (held < kBirth && std::ranges::any_of(calls.blocked, GivesBirth)) continue;
    // As in HandleEvents: what is true before the event is read stays true if we are killed now.
    UNMOOR_TRY(DropWhatIsGivenBack(calls));
    UNMOOR_TRY(KnowChildren());
    UNMOOR_ASSIGN(auto event, ReadUffdEvent(uffd_.get()));
    if (!event) continue;
    Collect(*event, calls, events);
    NoteEvent(*event, calls, changed);
  }
}

void Worker::Collect(const UffdEvent& event, const ThreadCalls& calls, HeldEvents& events) {
  if (event.kind == UffdEvent::Kind::kRemove) events.given_back.push_back(event.range);
  if (event.kind == UffdEvent::Kind::kUnmap) events.cut.push_back(event.range.begin);
  if (event.kind == UffdEvent::Kind::kRemap) {
    const MovedMemory moved{event.range, event.to};
    const BlockedCall* mover = MoverOf(calls, event.range);
    if (mover == nullptr) events.unexplained.push_back(moved);
    if (mover != nullptr) NoteMove(moved, *mover, events);
  }
}

// The event has the old length only, and the VMA there now may be longer for having joined its
// neighbours; so the call says what was added. With MREMAP_DONTUNMAP the old place stays mapped,
// and empty.
void Worker::NoteMove(const MovedMemory& moved, const BlockedCall& call, HeldEvents& events) {
  constexpr uint64_t kDontUnmap = 4;
  if ((call.args[3] & kDontUnmap) != 0) events.given_back.push_back(moved.from);
  const VaddrRange grown{moved.to + moved.from.size(),
                         moved.to + Bytes(AlignUp(call.args[2], kPageSize))};
  if (grown.begin < grown.end) events.grown.push_back(grown);
}

// On a busy machine an event can be read before its thread was seen asleep. It is stopped by now,
// or asleep: no thread has run on since.
Result<> Worker::ExplainMoves(HeldEvents& events) {
  UNMOOR_ASSIGN(const ThreadCalls calls, ReadThreadCalls(pid_));
  for (const MovedMemory& moved : events.unexplained) {
    const BlockedCall* mover = MoverOf(calls, moved.from);
    if (mover != nullptr) NoteMove(moved, *mover, events);
    if (mover == nullptr) spdlog::debug("nobody is seen to have moved {}", moved.from);
  }
  return {};
}

Result<> Worker::DropWhatIsGivenBack(const ThreadCalls& calls) {
  for (const BlockedCall& call : calls.blocked) {
    if (!GivesMemoryBack(call)) continue;
    const uint64_t length = AlignUp(call.args[1], kPageSize);
    UNMOOR_TRY(Drop({Vaddr(call.args[0]), Vaddr(call.args[0] + length)}));
  }
  return {};
}

// No effect when the window has released them already.
Result<> Worker::ReleaseProgram() {
  OpList thaw;
  thaw.Thaw();
  UNMOOR_TRY(link_.Must(thaw, "cannot release the program's threads"));
  // Whoever makes events without pause must not make the program stand still.
  const Nanos now = MonotonicNow();
  const Nanos held = now - held_since_;
  longest_hold_ = std::max(longest_hold_, held);
  if (held <= options_.max_pause) return {};
  next_hold_ = now + Nanos(held.value * (held_in_vain_ ? kRunsAfterHoldInVain : 1));
  return {};
}

// `calls`: as read before the event was.
void Worker::NoteEvent(UffdEvent& event, const ThreadCalls& calls, bool& changed) {
  touched_.Insert(event.range);
  if (event.kind == UffdEvent::Kind::kFork) FindForkedChild(std::move(event.child), calls);
  if (event.kind == UffdEvent::Kind::kUnmap || event.kind == UffdEvent::Kind::kRemap) {
    dropped_.Erase(event.range);
    refused_.Erase(event.range);
    changed = true;
  }
}

// Whether `range` is being remapped and was given back before: what the program wrote there since
// is emptied by its thread some time after the event is read, and a copy taken until then would
// come back to life with the swap. An image is replaced before the event is read and has no such
// moment.
bool Worker::MayCopyGivenBack(VaddrRange range) const {
  return std::ranges::any_of(mirrors_, [&](const Mirror& mirror) {
    return dropped_.SizeWithin(mirror.area.range.Intersect(range)).value != 0;
  });
}

// Makes `range` what MADV_DONTNEED makes of anonymous memory, wherever it still maps an image, and
// forgets what was copied of it.
Result<> Worker::Drop(VaddrRange range) {
  if (range.empty()) return {};
  for (Vaddr at = range.begin; at < range.end;) {
    UNMOOR_ASSIGN(const auto vma, QueryVma(maps_.get(), at));
    if (!vma || vma->range.begin >= range.end) break;
    const VaddrRange part = vma->range.Intersect({std::max(at, vma->range.begin), range.end});
    if (IsKnownImage(*vma)) UNMOOR_TRY(DropImagePart(part, vma->prot));
    at = vma->range.end;
  }
  OpList forget;
  for (const Mirror& mirror : mirrors_) {
    const VaddrRange part = mirror.area.range.Intersect(range);
    if (part.empty()) continue;
    AddAdvice(forget, {mirror.At(part.begin), mirror.At(part.end)}, MADV_DONTNEED);
  }
  if (forget.size() > 0) UNMOOR_TRY(link_.Must(forget, "cannot clear staging memory"));
  return {};
}

Result<> Worker::DropImagePart(VaddrRange part, int prot) {
  const auto wish = std::ranges::find_if(
      images_, [&](const VmaInfo& vma) { return vma.range.Contains(part.begin); });
  const auto wished = [&](const char* flag) {
    return wish != images_.end() && wish->HasFlag(flag);
  };
  // One list, which the helper finishes even if we are killed. Unregistered first: the mapping
  // would otherwise wait for us to read its event.
  OpList ops;
  ops.Ioctl(helper_uffd_, UFFDIO_UNREGISTER, {part.begin.value, part.size().value, 0, 0, 0});
  ops.Syscall(SYS_mmap, {part.begin.value, part.size().value, static_cast<uint64_t>(prot),
                         static_cast<uint64_t>(MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED |
                                               (wished("nr") ? MAP_NORESERVE : 0)),
                         ~uint64_t{0}, 0});
  for (const FlagAdvice& f : kFlagAdvice) {
    if (wished(f.flag)) AddAdvice(ops, part, f.advice);
  }
  if (wish != images_.end()) {
    const FileOffset offset = wish->offset + (part.begin - wish->range.begin);
    UNMOOR_TRY(AddName(ops, part, names_.At(wish->name, offset)));
  }
  ops.Ioctl(helper_uffd_, UFFDIO_REGISTER,
            {part.begin.value, part.size().value, UFFDIO_REGISTER_MODE_WP, 0, 0});
  const auto replaced = link_.Must(ops, "cannot give memory back inside the program");
  if (!replaced) {
    const auto watched = UffdRegister(uffd_.get(), part, UffdMode::kWriteProtect);
    if (replaced.error().errnum() != ENOMEM) {
      UNMOOR_TRY(watched);
      return Failure(replaced.error());
    }
    unreplaced_.push_back(part);  // no mapping to spare (vm.max_map_count)
    return {};
  }
  dropped_.Insert(part);
  dropped_bytes_ += part.size();
  return {};
}

// A VMA that grew while it moved shows what follows in its file. Behind an extent that is a hole,
// but not where the VMA had been shortened before: that is overwritten, since giving it back would
// cut the VMA in two and the program's next mremap of it would fail.
Result<> Worker::ZeroGrowth(VaddrRange grown) {
  if (grown.empty()) return {};
  UNMOOR_ASSIGN(const auto vma, QueryVma(maps_.get(), grown.begin));
  if (!vma || vma->range.begin >= grown.begin || !IsKnownImage(*vma)) return {};
  return ZeroShown(*vma, grown);
}

// What was given back without a mapping to spare, of what the events read say: its threads have
// emptied it and are stopped. Of the rest the event waits still, and it is dropped again.
Result<> Worker::ZeroUnreplaced(std::span<const VaddrRange> given_back) {
  for (const VaddrRange range : std::exchange(unreplaced_, {})) {
    for (const VaddrRange given : given_back) {
      const VaddrRange part = range.Intersect(given);
      std::optional<VmaInfo> vma;
      for (Vaddr at = part.begin; at < part.end; at = vma->range.end) {
        UNMOOR_ASSIGN(vma, QueryVma(maps_.get(), at));
        if (!vma || vma->range.begin >= part.end) break;
        if (IsKnownImage(*vma)) UNMOOR_TRY(ZeroShown(*vma, part));
      }
    }
  }
  return {};
}

// Zeros in place of what the image has in `range` of its mapping.
Result<> Worker::ZeroShown(const VmaInfo& vma, VaddrRange range) {
  const VaddrRange shown = vma.range.Intersect(range);
  UNMOOR_ASSIGN(const ImageFile* file, FileOf(vma));
  const auto offset = [&](Vaddr at) { return vma.offset + (at - vma.range.begin); };
  UNMOOR_ASSIGN(const std::vector<FileRange> data,
                DataRanges(file->fd.get(), {offset(shown.begin), offset(shown.end)}, "page image"));
  const auto address = [&](FileOffset at) { return vma.range.begin + (at - vma.offset); };
  for (const FileRange& part : data)
    UNMOOR_TRY(WriteZeros({address(part.begin), address(part.end)}));
  return {};
}

// With every thread stopped.
Result<> Worker::ConvertCuts() {
  while (!cuts_.empty()) {
    const Vaddr end(*cuts_.begin());
    cuts_.erase(cuts_.begin());
    UNMOOR_TRY(ConvertShortened(end));
  }
  return {};
}

// A shortened VMA that grew again in place would show its file's old bytes, and no event tells of
// such growth. So it becomes anonymous at once, while its program is held; of a large one only the
// last page, which makes growing it fail (EFAULT) until the remap gets there.
Result<> Worker::ConvertShortened(Vaddr end) {
  UNMOOR_ASSIGN(const auto below, QueryVma(maps_.get(), end - Bytes(kPageSize)));
  if (!below || below->range.end != end || !IsKnownImage(*below)) return {};
  UNMOOR_ASSIGN(const ProcessInfo process, ReadProcess(pid_));
  if (VaddrRange{process.start_brk, process.start_brk + kHeapReach}.Contains(below->range.begin)) {
    return {};  // grows by brk, which makes anonymous memory
  }
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadSmaps(pid_));
  for (Area& area : FindAreas(vmas, MapsPageImage, dropped_)) {
    if (area.range.end != end || refused_.SizeWithin(area.range).value > 0) continue;
    if (area.range.size() > kConvertAtOnce) {
      area.offset = area.OffsetOf(end - Bytes(kPageSize)).value;
      area.range.begin = end - Bytes(kPageSize);
    }
    UNMOOR_ASSIGN(PlannedArea planned, PlanArea(std::move(area)));
    areas_.push_back(std::move(planned));
    const auto converted = ConvertHeld(areas_.size() - 1);
    areas_.pop_back();
    return converted;
  }
  return {};
}

Result<> Worker::ConvertHeld(size_t index) {
  const VaddrRange range = areas_[index].area.range;
  const bool was_stale = std::exchange(stale_, false);
  UNMOOR_ASSIGN(const std::vector<VaddrRange> own_ranges, OwnPages(range, false));
  RangeSet own;
  for (const VaddrRange part : own_ranges) own.Insert(part);
  std::vector<CopyStep> steps;
  for (const VaddrRange block : CutIntoBlocks(range)) {
    steps.push_back({block, ContentOf(block, areas_[index].image_data, own, dropped_), false});
  }
  // Whether there is memory to spare or not: what stays direct-mapped here would show old bytes.
  if (!steps.empty()) UNMOOR_TRY(CopySteps(index, steps));
  // Not what it should be, although nobody runs: better direct-mapped than incomplete.
  if (stale_) return {};
  stale_ = was_stale;
  OpList ops;
  AddSwap(ops, {index, range});
  UNMOOR_ASSIGN(const helper::Reply reply, RunSwaps(ops));
  if (reply.error != 0) {
    return SystemError(reply.error, "cannot make a shortened mapping anonymous");
  }
  dropped_.Erase(range);
  converted_ += areas_[index].image_data.SizeWithin(range);
  return {};
}

// For a program that changes its mappings faster than a plan of them lasts: areas are
// copied and swapped while it is held, small ones first.
Result<> Worker::ConvertHot() {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadSmaps(pid_));
  RememberImages(vmas);
  for (int i = 0; i < kHotAreas && !program_ended(); ++i) {
    const Nanos now = MonotonicNow();
    if (now < next_hold_) SleepFor(next_hold_ - now);
    bool changed = false;
    Result<> done = HoldProgram(changed);
    if (done) done = ConvertSmallest();
    UNMOOR_TRY(ReleaseProgram());
    if (!done && done.error().errnum() != EAGAIN) return done;
  }
  return {};
}

// Of the areas as they are now, whose flags were read a moment ago; whole where the remapper would
// swap it whole, for the sake of mremap.
Result<> Worker::ConvertSmallest() {
  UNMOOR_ASSIGN(std::vector<VmaInfo> vmas, ReadMaps(pid_));
  std::erase_if(vmas, [&](VmaInfo& vma) {
    if (!MapsPageImage(vma)) return false;
    const auto known = std::ranges::find_if(images_, [&](const VmaInfo& image) {
      return image.range.Contains(vma.range) && image.inode == vma.inode &&
             image.offset + (vma.range.begin - image.range.begin) == vma.offset;
    });
    if (known == images_.end()) return true;
    vma.vm_flags = known->vm_flags;
    return false;
  });
  std::vector<Area> areas = FindAreas(vmas, MapsPageImage, dropped_);
  std::erase_if(areas, [&](const Area& area) { return refused_.SizeWithin(area.range).value > 0; });
  const auto smallest = std::ranges::min_element(
      areas, {}, [](const Area& candidate) { return candidate.range.size(); });
  if (smallest == areas.end()) return {};
  Area& area = *smallest;
  if (area.range.size() > kHotPart && plans_in_a_row_ < kPlansBeforeLargeAreas) return {};
  UNMOOR_TRY(FileOf(area));
  UNMOOR_TRY(MirrorFor(area));  // for all of it, so that its parts join again
  if (area.range.size() > kWholeArea) area.range.end = area.range.begin + kHotPart;
  for (const VmaInfo& vma : vmas) {
    const VaddrRange part = vma.range.Intersect(area.range);
    if (part.empty() || !MapsPageImage(vma)) continue;
    UNMOOR_TRY(UffdRegister(uffd_.get(), part, UffdMode::kWriteProtect));
  }
  UNMOOR_ASSIGN(PlannedArea planned, PlanArea(std::move(area)));
  areas_.push_back(std::move(planned));
  const auto converted = ConvertHeld(areas_.size() - 1);
  areas_.pop_back();
  return converted;
}

// The parent sleeps in fork until its event is read, and only then its child appears: whoever was
// there before is not it. (posix_spawn and vfork make children without an event.)
Result<> Worker::KnowChildren() {
  UNMOOR_ASSIGN(const std::vector<Pid> children, ReadChildren(pid_));
  known_children_.clear();
  for (const Pid child : children) known_children_.insert(child.value);
  return {};
}

// The child is that of a thread which waited in fork before the event was read and has gone on
// since. One that has ended already needs no agent. Without knowing the thread (on a busy machine
// it may not have been seen asleep) it may be any that may be in fork, and its child any new one.
void Worker::FindForkedChild(Fd uffd, const ThreadCalls& calls) {
  constexpr Nanos kLimit(100'000'000);
  struct Forker {
    Pid thread;
    std::optional<Nanos> ran;  // when first looked at late, if it ran or waited for a CPU then
  };
  std::vector<Forker> forking;
  for (const BlockedCall& call : calls.blocked) {
    if (call.waits_for_event && Forks(call)) forking.push_back({call.thread, std::nullopt});
  }
  const bool known = !forking.empty();
  const auto may_be_forking = [this](const Forker& f) { return MayBeForking(pid_, f.thread); };
  if (!known) {
    const auto threads = ReadThreads(pid_);
    if (!threads) return;
    for (const Pid thread : *threads) forking.push_back({thread, std::nullopt});
    std::erase_if(forking, std::not_fn(may_be_forking));
  }
  // What of fork comes after the event takes far less of a CPU than this, but getting one may take
  // long, as may what is held by somebody who lacks one. To sleep in a fork with no event waiting
  // is to sleep in the rest of that one.
  const auto is_held_up = [this](Forker& forker) {
    constexpr int64_t kRestOfFork = 20'000'000;
    const auto now = RunTimeIfRunnable(pid_, forker.thread);
    if (!now) {
      return MayBeForking(pid_, forker.thread) &&
             !WaitReadable(uffd_.get(), Nanos(0)).value_or(true);
    }
    if (!forker.ran) forker.ran = now;
    return now->value - forker.ran->value < kRestOfFork;
  };
  const Nanos began = MonotonicNow();
  for (;;) {
    // Looked at before the children are.
    const bool born = known ? !std::ranges::all_of(forking, may_be_forking)
                            : std::ranges::none_of(forking, may_be_forking);
    std::vector<Pid> children;
    for (const Forker& forker : forking) {
      const std::vector<Pid> its = ReadChildrenOf(pid_, forker.thread);
      children.insert(children.end(), its.begin(), its.end());
    }
    if (!known) {
      const auto all = ReadChildren(pid_);
      if (!all) return;
      children = *all;
    }
    for (const Pid child : children) {
      if (known_children_.contains(child.value) || !IsForked(child)) continue;
      known_children_.insert(child.value);
      if (on_fork_) on_fork_(child, std::move(uffd));
      return;
    }
    const Nanos waited = MonotonicNow() - began;
    const bool late = waited > kLimit;
    if (born || waited > kLongestHoldOfStarved) return;
    if (late && std::ranges::none_of(forking, is_held_up)) return;
    SleepFor(Nanos(late ? 1'000'000 : 50'000));
  }
}

// Whether it has memory of its own that maps an image. One of vfork or posix_spawn has the
// program's, with the helper in it, which forked children don't get.
bool Worker::IsForked(Pid child) const {
  const auto vmas = ReadMaps(child);
  if (!vmas || std::ranges::none_of(*vmas, MapsPageImage)) return false;
  return std::ranges::none_of(
      *vmas, [&](const VmaInfo& vma) { return vma.range.Contains(link_.helper().region); });
}

}  // namespace unmoor
