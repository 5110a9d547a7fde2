// Freestanding. See window.h. No libc, no allocation, no sanitizers.
#include "remap/local/window.h"

#include <linux/userfaultfd.h>

#include "os/kernel_abi.h"
#include "remap/local/fault_guard.h"
#include "remap/local/rendezvous.h"

namespace unmoor::local {

Locks locks;

namespace {

using raw::Address;
using raw::Call;
using raw::Word;

constexpr uint64_t kPage = 4096;
constexpr uint32_t kRead = 1, kWrite = 2;  // PROT_…
constexpr long kPrivateAnonymousFixed = 0x02 | 0x20 | 0x10;
constexpr long kMoveFixedDontUnmap = 1 | 2 | 4;  // MREMAP_…
constexpr long kDontNeed = 4;                    // MADV_…
constexpr uint32_t kMaxImages = 1024, kMaxMirrors = 4096, kMaxTracked = 1024;
constexpr int kEventsAtOnce = 64;
constexpr int64_t kDetachLimit = 1'000'000'000;
constexpr int64_t kSettleLimit = 1'000'000'000;
constexpr long kEstale = 116, kE2big = 7;

struct KnownImage {
  uint64_t device = 0, inode = 0;
  int fd = -1;
  uint32_t users = 0;
};

struct TrackedRange {
  uint64_t begin = 0, end = 0;  // end 0: free
  uint64_t* bits = nullptr;
};

struct State {
  KnownImage images[kMaxImages];
  uint32_t image_count = 0;
  MirrorPlace mirrors[kMaxMirrors];
  uint32_t mirror_count = 0;
  TrackedRange tracked[kMaxTracked];
  // Of the fault handler's installs: the last, and the last since which every thread has been in
  // the rendezvous.
  long installed = 0, everybody_passed = 0;
};
State state;

KnownImage* FindImage(uint64_t device, uint64_t inode) {
  if (inode == 0) return nullptr;
  for (uint32_t i = 0; i < state.image_count; ++i) {
    KnownImage& image = state.images[i];
    if (image.device == device && image.inode == inode) return &image;
  }
  return nullptr;
}

uint64_t DeviceOf(const kernel::ProcmapQuery& vma) {
  return uint64_t{vma.dev_major} << 32 | vma.dev_minor;
}

// The VMA that holds `at`, or the next one; of those that `which` (a query flag) allows.
bool QueryVma(const Descriptors& fds, uint64_t at, kernel::ProcmapQuery& vma, uint64_t which = 0) {
  vma = {};
  vma.size = sizeof(vma);
  vma.query_flags = kernel::kProcmapQueryCoveringOrNext | which;
  vma.query_addr = at;
  return Call(__NR_ioctl, fds.maps, Word(kernel::kProcmapQuery), Address(&vma)) == 0;
}

bool IsImage(const kernel::ProcmapQuery& vma) {
  return (vma.vma_flags & 8 /*shared*/) == 0 && FindImage(DeviceOf(vma), vma.inode) != nullptr;
}

// Whether our userfaultfd watches the page: a thread in a system call about it then waits for us.
bool IsWatched(const Descriptors& fds, uint64_t page) {
  Region region{};
  kernel::PmScanArg scan{};
  scan.size = sizeof(scan);
  scan.start = page;
  scan.end = page + kPage;
  scan.vec = static_cast<uint64_t>(Address(&region));
  scan.vec_len = 1;
  scan.category_mask = kernel::kPageIsWpAllowed;
  scan.return_mask = kernel::kPageIsWpAllowed;
  return Call(__NR_ioctl, fds.pagemap, Word(kernel::kPagemapScan), Address(&scan)) == 1;
}

long Unregister(const Descriptors& fds, uint64_t begin, uint64_t end) {
  uffdio_range range{begin, end - begin};
  return Call(__NR_ioctl, fds.uffd, Word(UFFDIO_UNREGISTER), Address(&range));
}

long Register(const Descriptors& fds, uint64_t begin, uint64_t end) {
  return WatchMemory(fds.uffd, begin, end);
}

long WriteProtect(const Descriptors& fds, uint64_t begin, uint64_t end) {
  uffdio_writeprotect range{};
  range.range = {begin, end - begin};
  range.mode = UFFDIO_WRITEPROTECT_MODE_WP;
  long error = 0;
  do {
    error = Call(__NR_ioctl, fds.uffd, Word(UFFDIO_WRITEPROTECT), Address(&range));
  } while (error == -raw::kEagain);
  return error;
}

long Protect(uint64_t begin, uint64_t end, uint32_t protection) {
  return Call(__NR_mprotect, Word(begin), Word(end - begin), static_cast<long>(protection));
}

long MoveOver(uint64_t from, uint64_t to, uint64_t length) {
  // SAFETY: `to` was verified to be the mapping that is to be replaced, and nobody can change that
  // now; `from` is our mirror. DONTUNMAP keeps our hold on the mirror's addresses.
  return Call(__NR_mremap, Word(from), Word(length), Word(length), kMoveFixedDontUnmap, Word(to));
}

void CopyBytes(uint64_t to, uint64_t from, uint64_t length) {
  // SAFETY: both ranges are mapped; nobody can unmap them now.
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
}

// Reads memory of our own that somebody may unmap meanwhile.
bool ReadMemory(const Descriptors& fds, uint64_t to, uint64_t from, uint64_t length) {
  while (length > 0) {
    const long n = Call(__NR_pread64, fds.memory, Word(to), Word(length), Word(from));
    if (n == -raw::kEintr) continue;
    if (n <= 0) return false;
    to += static_cast<uint64_t>(n);
    from += static_cast<uint64_t>(n);
    length -= static_cast<uint64_t>(n);
  }
  return true;
}

// The parts of the pieces that still map the image as planned. 0 or -E2BIG.
long CollectParts(const Descriptors& fds, const WindowPiece* pieces, uint32_t count,
                  WindowRoom& room, uint32_t& part_count, bool& skipped) {
  for (uint32_t i = 0; i < count; ++i) {
    const WindowPiece& piece = pieces[i];
    for (uint64_t at = piece.begin; at < piece.end;) {
      kernel::ProcmapQuery vma;
      if (!QueryVma(fds, at, vma) || vma.vma_start >= piece.end) {
        skipped = true;
        break;
      }
      const uint64_t begin = vma.vma_start > at ? vma.vma_start : at;
      const uint64_t end = vma.vma_end < piece.end ? vma.vma_end : piece.end;
      skipped = skipped || begin > at;
      at = end;
      // What changed since the plan is left to the next one, and does not hold up the rest.
      const uint64_t offset = vma.vma_offset + (begin - vma.vma_start);
      if (DeviceOf(vma) != piece.device || vma.inode != piece.inode ||
          offset != piece.offset + (begin - piece.begin) || (vma.vma_flags & 8) != 0 ||
          (vma.vma_flags & 7) != piece.protection) {
        skipped = true;
        continue;
      }
      if (part_count == sizeof(room.parts) / sizeof(room.parts[0])) return -kE2big;
      room.parts[part_count++] = {begin, end, i};
    }
  }
  return 0;
}

// Vectorised by the compiler: this is what a window spends on pages of the program's own.
__attribute__((optimize("O3"))) bool SamePage(uint64_t a, uint64_t b) {
  // SAFETY: both pages are mapped and readable; nobody can unmap them now.
  const auto* x = reinterpret_cast<const uint64_t*>(a);
  const auto* y = reinterpret_cast<const uint64_t*>(b);
  uint64_t difference = 0;
  for (uint32_t i = 0; i < kPage / sizeof(uint64_t); ++i) difference |= x[i] ^ y[i];
  return difference == 0;
}

// Copies what was written since the last look. Nothing can be written any more.
//
// With everybody at rest, pages of the process's own that do not show as written are compared as
// well: a transfer by a device (a read with O_DIRECT) writes behind the page tables, and one that
// was under way as the page was copied, and has ended since, left no other trace.
long Recheck(const Descriptors& fds, const WindowPiece* pieces, const Part& part, bool frozen,
             uint64_t dirty_limit, WindowRoom& room, uint32_t& recopied) {
  const WindowPiece& piece = pieces[part.piece];
  const uint64_t delta = piece.mirror - piece.begin;
  const bool readable = (piece.protection & kRead) != 0;
  const bool compare = frozen && readable && (piece.protection & kWrite) != 0;
  const auto copy = [&](uint64_t begin, uint64_t end) -> long {
    const uint64_t pages = (end - begin) / kPage;
    if (recopied + pages > dirty_limit) return -kE2big;
    recopied += static_cast<uint32_t>(pages);
    NoteWritten(begin, end);
    if (frozen && readable) {
      CopyBytes(begin + delta, begin, end - begin);
      return 0;
    }
    return ReadMemory(fds, begin + delta, begin, end - begin) ? 0 : -kEstale;
  };
  for (uint64_t at = part.begin; at < part.end;) {
    kernel::PmScanArg scan{};
    scan.size = sizeof(scan);
    scan.flags = kernel::kPmScanCheckWpAsync;
    scan.start = at;
    scan.end = part.end;
    scan.vec = static_cast<uint64_t>(Address(room.regions));
    scan.vec_len = sizeof(room.regions) / sizeof(room.regions[0]);
    scan.category_inverted = kernel::kPageIsFile | kernel::kPageIsPfnZero;
    scan.category_mask =
        kernel::kPageIsFile | kernel::kPageIsPfnZero | (compare ? 0 : kernel::kPageIsWritten);
    scan.category_anyof_mask = kernel::kPageIsPresent | kernel::kPageIsSwapped;
    scan.return_mask = kernel::kPageIsWritten;
    const long regions = Call(__NR_ioctl, fds.pagemap, Word(kernel::kPagemapScan), Address(&scan));
    if (regions < 0) return regions;
    for (long i = 0; i < regions; ++i) {
      const Region& region = room.regions[i];
      const bool written = (region.categories & kernel::kPageIsWritten) != 0;
      long error = written ? copy(region.start, region.end) : 0;
      for (uint64_t page = region.start; !written && error == 0 && page < region.end;
           page += kPage) {
        if (!SamePage(page, page + delta)) error = copy(page, page + kPage);
      }
      if (error < 0) return error;
    }
    if (scan.walk_end <= at) return -kEstale;
    at = scan.walk_end;
  }
  return 0;
}

// The mirror takes the part's place. On failure the part is watched as before. Tracked memory
// arrives read-only and gets its protection last, so that no write comes between swap and baseline.
long SwapPart(const Descriptors& fds, const WindowPiece& piece, const Part& part) {
  const uint64_t mirror = piece.mirror + (part.begin - piece.begin);
  const uint64_t length = part.end - part.begin;
  const bool tracked = IsTracked(part.begin, part.end);
  const uint32_t arriving = tracked ? piece.protection & ~kWrite : piece.protection;
  if (arriving != (kRead | kWrite)) {
    const long error = Protect(mirror, mirror + length, arriving);
    if (error < 0) return error;
  }
  // Unregistered first: the swap would otherwise wait for somebody to read its event.
  const long unwatched = Unregister(fds, part.begin, part.end);
  const long moved = unwatched < 0 ? unwatched : MoveOver(mirror, part.begin, length);
  if (arriving != (kRead | kWrite)) Protect(mirror, mirror + length, kRead | kWrite);
  if (moved < 0) {
    Register(fds, part.begin, part.end);
    return moved;
  }
  if (!tracked) return 0;
  if (Register(fds, part.begin, part.end) < 0 || WriteProtect(fds, part.begin, part.end) < 0) {
    NoteWritten(part.begin, part.end);  // unseen from here on: all of it counts as written
  }
  return Protect(part.begin, part.end, piece.protection);
}

WindowResult Outcome(long error, WindowResult result) {
  switch (-error) {
    case 0:
      result.outcome = WindowResult::kSwapped;
      break;
    case kE2big:
      result.outcome = WindowResult::kTooDirty;
      break;
    case kEstale:
    case 1:   // EPERM: no longer registered
    case 22:  // EINVAL
      result.outcome = WindowResult::kStale;
      break;
    default:
      result.outcome = WindowResult::kFailed;
      result.error = static_cast<int32_t>(-error);
  }
  return result;
}

struct Hull {
  uint64_t begin = ~uint64_t{0}, end = 0;
};

Hull HullOf(const WindowPiece* pieces, uint32_t count) {
  Hull hull;
  for (uint32_t i = 0; i < count; ++i) {
    if (pieces[i].begin < hull.begin) hull.begin = pieces[i].begin;
    if (pieces[i].end > hull.end) hull.end = pieces[i].end;
  }
  return hull;
}

long SwapQuiet(const Descriptors& fds, const WindowPiece* pieces, uint32_t count,
               uint64_t dirty_limit, WindowRoom& room, WindowResult& result) {
  uint32_t parts = 0;
  long error = CollectParts(fds, pieces, count, room, parts, result.skipped);
  for (uint32_t i = 0; error == 0 && i < parts; ++i) {
    error = Recheck(fds, pieces, room.parts[i], true, dirty_limit, room, result.recopied);
  }
  for (uint32_t i = 0; error == 0 && i < parts; ++i) {
    error = SwapPart(fds, pieces[room.parts[i].piece], room.parts[i]);
  }
  return error;
}

// A guard needs every writer able to take a signal on a stack of its own elsewhere.
bool MayGuard(const Descriptors& fds, const WindowPiece& piece) {
  if ((piece.protection & kWrite) == 0 || HoldsThreadMemory(fds.tasks, piece.begin, piece.end)) {
    return false;
  }
  state.installed = EnsureFaultHandler();
  return state.installed > 0;
}

// With the guard raised: whether every thread that has SIGSEGV blocked waits for it. (One that
// waits does so to the end; one on its way into our handler gets a moment.)
bool NobodyBlocksFaults(const Descriptors& fds) {
  constexpr int kSigsegv = 11, kLooks = 5;
  for (int i = 0; i < kLooks; ++i) {
    if (i > 0) raw::Sleep(20'000);
    const long waiting = WaitingForGuard();
    if (CountBlocking(fds.tasks, kSigsegv) == waiting) return true;
  }
  return false;
}

WindowResult SwapGuardedLocked(const Descriptors& fds, const WindowPiece& piece,
                               uint64_t dirty_limit, WindowRoom& room) {
  WindowResult result;
  uint32_t parts = 0;
  const long collected = CollectParts(fds, &piece, 1, room, parts, result.skipped);
  if (collected < 0 || parts == 0) return Outcome(collected, result);
  const int64_t began = raw::Now();
  RaiseGuard(piece.begin, piece.end, static_cast<int>(piece.protection), room.parts, parts);
  if (!NobodyBlocksFaults(fds)) {
    LowerGuard();
    result.outcome = WindowResult::kUnguardable;
    return result;
  }
  long error = 0;
  uint32_t swapped = 0;
  for (uint32_t i = 0; error == 0 && i < parts; ++i) {
    error = Protect(room.parts[i].begin, room.parts[i].end, piece.protection & ~kWrite);
  }
  for (uint32_t i = 0; error == 0 && i < parts; ++i) {
    error = Recheck(fds, &piece, room.parts[i], false, dirty_limit, room, result.recopied);
  }
  for (; error == 0 && swapped < parts; ++swapped) {
    error = SwapPart(fds, piece, room.parts[swapped]);
    if (error != 0) break;
  }
  for (uint32_t i = swapped; i < parts; ++i) {
    Protect(room.parts[i].begin, room.parts[i].end, piece.protection);
  }
  LowerGuard();
  result = Outcome(error, result);
  result.guard_ns = raw::Now() - began;
  return result;
}

// --- events -------------------------------------------------------------------------------------

const MirrorPlace* FindMirror(const kernel::ProcmapQuery& vma, uint64_t begin, uint64_t end) {
  for (uint32_t i = 0; i < state.mirror_count; ++i) {
    const MirrorPlace& place = state.mirrors[i];
    if (place.begin <= begin && end <= place.end && place.device == DeviceOf(vma) &&
        place.inode == vma.inode && place.protection == (vma.vma_flags & 7) &&
        place.offset + (begin - place.begin) == vma.vma_offset + (begin - vma.vma_start)) {
      return &place;
    }
  }
  return nullptr;
}

// What MADV_DONTNEED makes of anonymous memory. With a mirror it comes from there, so that it joins
// what is swapped around it. False: there is no mapping to spare (vm.max_map_count), and the image
// is mapped there still.
bool MakeZero(const Descriptors& fds, const kernel::ProcmapQuery& vma, uint64_t begin,
              uint64_t end) {
  const auto protection = static_cast<uint32_t>(vma.vma_flags & 7);
  const MirrorPlace* place = FindMirror(vma, begin, end);
  if (Unregister(fds, begin, end) < 0) return false;
  bool moved = false;
  if (place != nullptr) {
    // A copying thread may be at this part of the mirror: that stays writable. Nobody of the
    // program is awake to see what arrives before it has its protection.
    moved = MoveOver(place->base + (begin - place->begin), begin, end - begin) >= 0;
    if (moved) Call(__NR_madvise, Word(begin), Word(end - begin), kDontNeed);
    if (moved && protection != (kRead | kWrite)) moved = Protect(begin, end, protection) >= 0;
  }
  if (!moved) {
    // SAFETY: replaces a mapping of an image whose content its owner has just given back.
    const long mapped = Call(__NR_mmap, Word(begin), Word(end - begin),
                             static_cast<long>(protection), kPrivateAnonymousFixed, -1, 0);
    if (mapped < 0 && mapped > -4096) {
      Register(fds, begin, end);
      return false;
    }
  }
  if (IsTracked(begin, end)) Register(fds, begin, end);
  return true;
}

// Given back, with no mapping to spare: zeros are written there instead, once the kernel has
// emptied it and before its thread is back in the program.
struct Unreplaced {
  struct {
    uint64_t begin, end;
  } at[256];
  uint32_t count;
};
Unreplaced unreplaced;

void NoteUnreplaced(uint64_t begin, uint64_t end) {
  for (uint32_t i = 0; i < unreplaced.count; ++i) {
    if (unreplaced.at[i].begin == begin && unreplaced.at[i].end == end) return;
  }
  if (unreplaced.count == sizeof(unreplaced.at) / sizeof(unreplaced.at[0])) return;
  unreplaced.at[unreplaced.count++] = {begin, end};
}

void GiveBack(const Descriptors& fds, uint64_t begin, uint64_t end) {
  for (uint64_t at = begin; at < end;) {
    kernel::ProcmapQuery vma;
    if (!QueryVma(fds, at, vma) || vma.vma_start >= end) break;
    const uint64_t from = vma.vma_start > at ? vma.vma_start : at;
    const uint64_t to = vma.vma_end < end ? vma.vma_end : end;
    // What nobody watches is not ours: its owner may have returned and written there by now.
    if (IsImage(vma) && IsWatched(fds, from) && !MakeZero(fds, vma, from, to)) {
      NoteUnreplaced(from, to);
    }
    at = vma.vma_end;
  }
  NoteWritten(begin, end);
}

struct Sleepers {
  const Descriptors* fds;
  uint32_t giving_back = 0;
  struct {
    uint64_t begin, end;
  } kept[16] = {};  // left mapped by an mremap that moved their pages away
  uint32_t kept_count = 0;
  struct {
    uint64_t begin, length;
  } grown[16] = {};  // made longer by an mremap
  uint32_t grown_count = 0;

  // What the mapping that was [from, from + length) and begins at `to` now ends at.
  [[nodiscard]] uint64_t NewEnd(uint64_t from, uint64_t to, uint64_t length) const {
    for (uint32_t i = 0; i < grown_count; ++i) {
      if (grown[i].begin == from) return to + grown[i].length;
    }
    return to + length;
  }
};

void LookAtSleeper(void* context, const SleepingCall& call) {
  auto& sleepers = *static_cast<Sleepers*>(context);
  constexpr uint64_t kFree = 8, kDontNeedLocked = 24, kDontUnmap = 4;
  const uint64_t begin = call.args[0];
  const uint64_t end = begin + (call.args[1] + kPage - 1) / kPage * kPage;
  if (call.number == __NR_madvise &&
      (call.args[2] == kDontNeed || call.args[2] == kFree || call.args[2] == kDontNeedLocked)) {
    ++sleepers.giving_back;
    GiveBack(*sleepers.fds, begin, end);
  }
  if (call.number == __NR_mremap && (call.args[3] & kDontUnmap) != 0 && sleepers.kept_count < 16) {
    sleepers.kept[sleepers.kept_count++] = {begin, end};
  }
  if (call.number == __NR_mremap && call.args[2] > call.args[1] && sleepers.grown_count < 16) {
    sleepers.grown[sleepers.grown_count++] = {begin, (call.args[2] + kPage - 1) / kPage * kPage};
  }
}

// False: not all of it. Memory of the program that it may not write to is written all the same.
bool WriteZeros(const Descriptors& fds, uint64_t begin, uint64_t end) {
  static const char zeros[1 << 16] = {};
  while (begin < end) {
    const uint64_t step = end - begin < sizeof(zeros) ? end - begin : sizeof(zeros);
    const long n = Call(__NR_pwrite64, fds.memory, Address(zeros), Word(step), Word(begin));
    if (n <= 0) return false;
    begin += static_cast<uint64_t>(n);
  }
  return true;
}

// Zeros in place of what the file has in [begin, end) of its mapping, or, where it is not known,
// may have.
void ZeroShown(const Descriptors& fds, const kernel::ProcmapQuery& vma, uint64_t begin,
               uint64_t end) {
  constexpr long kSeekData = 3, kSeekHole = 4;
  const KnownImage* image = FindImage(DeviceOf(vma), vma.inode);
  if (image == nullptr) return;
  const uint64_t reach = vma.vma_end < end ? vma.vma_end : end;
  if (image->fd < 0) {
    WriteZeros(fds, begin, reach);
    return;
  }
  const uint64_t place = vma.vma_start - vma.vma_offset;  // of the file's first byte
  for (uint64_t at = begin; at < reach;) {
    const long data = Call(__NR_lseek, image->fd, Word(at - place), kSeekData);
    if (data < 0 || static_cast<uint64_t>(data) + place >= reach) return;
    const long hole = Call(__NR_lseek, image->fd, data, kSeekHole);
    if (hole <= data) return;
    at = static_cast<uint64_t>(hole) + place;
    if (!WriteZeros(fds, static_cast<uint64_t>(data) + place, at < reach ? at : reach)) return;
  }
}

// A VMA that grew while it moved shows what follows in its file: a hole, but where it had been
// shortened before. How much it grew only its mover knows: the VMA may be longer than that for
// having joined its neighbours.
void ZeroGrowth(const Descriptors& fds, uint64_t old_end, uint64_t new_end) {
  kernel::ProcmapQuery vma;
  if (new_end <= old_end || !QueryVma(fds, old_end, vma) || vma.vma_start >= old_end) return;
  const KnownImage* image = FindImage(DeviceOf(vma), vma.inode);
  if (image != nullptr && image->fd >= 0) ZeroShown(fds, vma, old_end, new_end);
}

// No thread gets past the handler.
void ZeroUnreplaced(const Descriptors& fds) {
  for (uint32_t i = 0; i < unreplaced.count; ++i) {
    kernel::ProcmapQuery vma;
    for (uint64_t at = unreplaced.at[i].begin; at < unreplaced.at[i].end; at = vma.vma_end) {
      if (!QueryVma(fds, at, vma) || vma.vma_start >= unreplaced.at[i].end) break;
      if (IsImage(vma)) {
        ZeroShown(fds, vma, vma.vma_start > at ? vma.vma_start : at, unreplaced.at[i].end);
      }
    }
  }
}

// A shortened VMA that grew again in place would show its file's old bytes, and no event tells of
// such growth. Its last page is made anonymous, which makes growing it fail (EFAULT) until the
// remap has got there. All threads are at rest.
void DetachLastPage(const Descriptors& fds, uint64_t end) {
  kernel::ProcmapQuery vma;
  const uint64_t page = end - kPage;
  if (!QueryVma(fds, page, vma) || vma.vma_start > page || vma.vma_end != end || !IsImage(vma)) {
    return;
  }
  static char content[kPage];
  if (!ReadMemory(fds, static_cast<uint64_t>(Address(content)), page, kPage)) return;
  const bool tracked = IsTracked(page, end);
  if (!MakeZero(fds, vma, page, end)) return;
  Call(__NR_pwrite64, fds.memory, Address(content), static_cast<long>(kPage), Word(page));
  if (tracked) NoteWritten(page, end);
}

// Where munmap may have shortened a mapping, to be looked at once everybody is in.
struct Cuts {
  uint64_t at[1024];
  uint32_t count;
  uint32_t waited_for;  // of these, in vain: no window waits longer for them once more
};
Cuts cuts;

bool IsShortened(const Descriptors& fds, uint64_t end) {
  kernel::ProcmapQuery below;
  return QueryVma(fds, end - kPage, below) && below.vma_end == end && below.vma_start < end &&
         IsImage(below);
}

// Reads what waits.
void AnswerEvents(const Descriptors& fds, const Sleepers& sleepers) {
  struct {
    uint64_t old_end, new_end;
  } grown[kEventsAtOnce];
  uint32_t grown_count = 0;
  for (int i = 0; i < kEventsAtOnce; ++i) {
    uffd_msg message{};
    if (Call(__NR_read, fds.uffd, Address(&message), sizeof(message)) != sizeof(message)) break;
    if (message.event == UFFD_EVENT_REMOVE) {
      GiveBack(fds, message.arg.remove.start, message.arg.remove.end);
    } else if (message.event == UFFD_EVENT_UNMAP) {
      const uint64_t begin = message.arg.remove.start;
      NoteWritten(begin, message.arg.remove.end);
      const bool room = cuts.count < sizeof(cuts.at) / sizeof(cuts.at[0]);
      if (room && IsShortened(fds, begin)) cuts.at[cuts.count++] = begin;
    } else if (message.event == UFFD_EVENT_REMAP) {
      const uint64_t from = message.arg.remap.from, to = message.arg.remap.to;
      const uint64_t length = message.arg.remap.len;
      NoteWritten(from, from + length);
      NoteWritten(to, to + length);
      grown[grown_count++] = {to + length, sleepers.NewEnd(from, to, length)};
      for (uint32_t k = 0; k < sleepers.kept_count; ++k) {
        if (sleepers.kept[k].begin == from) GiveBack(fds, from, from + length);
      }
    }
  }
  for (uint32_t i = 0; i < grown_count; ++i) {
    ZeroGrowth(fds, grown[i].old_end, grown[i].new_end);
  }
}

// What cannot be done before everybody is in.
bool HasWorkAtRest() {
  return cuts.count > cuts.waited_for || unreplaced.count > 0;
}

// After HoldReturns: everybody in, with the events of those that wait for one answered on the way;
// a thread may have several, one after the other. What is to be done then makes it wait for longer
// than the limit.
WindowAttempt AwaitServing(const Descriptors& fds, int64_t limit_ns) {
  constexpr int64_t kBetweenLooks = 100'000;
  const int64_t began = raw::Now();
  WindowAttempt attempt;
  for (;;) {
    if (raw::Readable(fds.uffd)) {
      Sleepers sleepers{};
      sleepers.fds = &fds;
      if (VisitUntilSettled(fds.tasks, LookAtSleeper, &sleepers, kSettleLimit)) {
        AnswerEvents(fds, sleepers);
      }
    }
    const int64_t limit = HasWorkAtRest() && limit_ns < kDetachLimit ? kDetachLimit : limit_ns;
    const int64_t left = began + limit - raw::Now();
    attempt = AwaitEverybody(fds.tasks, left < kBetweenLooks ? left : kBetweenLooks);
    if (attempt.error < 0 || attempt.open || left <= 0) break;
  }
  for (uint32_t i = 0; attempt.open && i < cuts.count; ++i) {
    if (IsShortened(fds, cuts.at[i])) DetachLastPage(fds, cuts.at[i]);
  }
  if (attempt.open) cuts.count = 0;
  cuts.waited_for = cuts.count;
  // Also with somebody still on his way: he does not run on before we are done.
  ZeroUnreplaced(fds);
  unreplaced.count = 0;
  return attempt;
}

WindowAttempt OpenServing(const Descriptors& fds, int64_t limit_ns) {
  WindowAttempt attempt;
  attempt.error = HoldReturns(fds.tasks);
  if (attempt.error >= 0) attempt = AwaitServing(fds, limit_ns);
  if (attempt.open) state.everybody_passed = state.installed;
  if (!attempt.open) CloseWindow();
  return attempt;
}

// False: not now, as somebody cannot be held, who might see the image where it was to be given
// back.
bool ServeEventsLocked(const Descriptors& fds) {
  if (!raw::Readable(fds.uffd)) return true;
  Sleepers sleepers{};
  sleepers.fds = &fds;
  // What sleeps before our eyes is answered before its event is read. A single thread sleeps for
  // that. With more the event may be one's whose call we have not seen yet, and one that sleeps may
  // wait for another's lock, wake, and be back at its memory before we have answered: so first each
  // is sent a signal, and nobody returns from the kernel until all are answered.
  const bool alone = CountThreads(fds.tasks) == 1;
  if (alone) ForEachSleeping(fds.tasks, LookAtSleeper, &sleepers);
  if (alone && sleepers.giving_back == 1 && unreplaced.count == 0) {
    AnswerEvents(fds, sleepers);
    return true;
  }
  const bool held = HoldReturns(fds.tasks) >= 0 &&
                    VisitUntilSettled(fds.tasks, LookAtSleeper, &sleepers, kSettleLimit);
  if (held) AnswerEvents(fds, sleepers);
  if (held && HasWorkAtRest()) AwaitServing(fds, kDetachLimit);
  CloseWindow();
  return held;
}

// Before the first guard under a newly installed handler. A fork under way copied the handlers
// before it copies the memory: its child would have the guard without the handler. It is over once
// its thread has been in the rendezvous.
bool EverybodyPassed(const Descriptors& fds, int64_t limit_ns, WindowResult& result) {
  if (state.installed == state.everybody_passed) return true;
  const int64_t began = raw::Now();
  const WindowAttempt attempt = OpenServing(fds, limit_ns);
  if (attempt.open) CloseWindow();
  result.late_thread = attempt.late_thread;
  result.pause_ns = raw::Now() - began;
  return attempt.open;
}

// The window with both locks held.
WindowResult SwapFrozenLocked(const Descriptors& fds, const WindowPiece* pieces, uint32_t count,
                              uint64_t dirty_limit, int64_t stop_limit_ns, WindowRoom& room) {
  WindowResult result;
  const int64_t began = raw::Now();
  const WindowAttempt attempt = OpenServing(fds, stop_limit_ns);
  if (!attempt.open) {
    result.late_thread = attempt.late_thread;
    result.pause_ns = raw::Now() - began;
    if (attempt.error < 0 && attempt.error != -raw::kEagain) {
      result.outcome = WindowResult::kFailed;
      result.error = static_cast<int32_t>(-attempt.error);
    }
    return result;
  }
  const Hull hull = HullOf(pieces, count);
  if (LocalStorageIsQuiet(fds.tasks, hull.begin, hull.end, stop_limit_ns)) {
    const long error = SwapQuiet(fds, pieces, count, dirty_limit, room, result);
    result = Outcome(error, result);
  }
  CloseWindow();
  result.pause_ns = raw::Now() - began;
  return result;
}

}  // namespace

long WatchMemory(int uffd, uint64_t begin, uint64_t end) {
  uffdio_register range{};
  range.range = {begin, end - begin};
  range.mode = UFFDIO_REGISTER_MODE_WP;
  return Call(__NR_ioctl, uffd, Word(UFFDIO_REGISTER), Address(&range));
}

bool AddImage(uint64_t device, uint64_t inode) {
  KnownImage* image = FindImage(device, inode);
  if (image == nullptr) {
    if (state.image_count == kMaxImages) return false;
    image = &state.images[state.image_count++];
    *image = {device, inode, -1, 0};
  }
  ++image->users;
  return true;
}

void RemoveImage(uint64_t device, uint64_t inode) {
  KnownImage* image = FindImage(device, inode);
  if (image != nullptr && --image->users == 0) *image = state.images[--state.image_count];
}

void SetImageFile(uint64_t device, uint64_t inode, int fd) {
  KnownImage* image = FindImage(device, inode);
  if (image != nullptr && fd >= 0) image->fd = fd;
}

void ForgetImageFile(int fd) {
  for (uint32_t i = 0; i < state.image_count; ++i) {
    if (state.images[i].fd == fd) state.images[i].fd = -1;
  }
}

bool AddMirror(const MirrorPlace& place) {
  if (state.mirror_count == kMaxMirrors) return false;
  state.mirrors[state.mirror_count++] = place;
  return true;
}

void RemoveMirror(uint64_t base) {
  for (uint32_t i = 0; i < state.mirror_count; ++i) {
    if (state.mirrors[i].base != base) continue;
    state.mirrors[i] = state.mirrors[--state.mirror_count];
    return;
  }
}

bool AddTracked(uint64_t begin, uint64_t end, uint64_t* bits) {
  for (TrackedRange& range : state.tracked) {
    if (range.end != 0) continue;
    range.begin = begin;
    range.bits = bits;
    __atomic_store_n(&range.end, end, __ATOMIC_SEQ_CST);
    return true;
  }
  return false;
}

void RemoveTracked(uint64_t begin) {
  for (TrackedRange& range : state.tracked) {
    if (range.end != 0 && range.begin == begin) {
      __atomic_store_n(&range.end, uint64_t{0}, __ATOMIC_SEQ_CST);
    }
  }
}

void NoteWritten(uint64_t begin, uint64_t end) {
  for (const TrackedRange& range : state.tracked) {
    const uint64_t range_end = __atomic_load_n(&range.end, __ATOMIC_SEQ_CST);
    if (range_end <= begin || end <= range.begin) continue;
    const uint64_t first = (begin > range.begin ? begin - range.begin : 0) / kPage;
    const uint64_t last = ((end < range_end ? end : range_end) - range.begin) / kPage;
    for (uint64_t page = first; page < last; ++page) {
      __atomic_fetch_or(&range.bits[page / 64], uint64_t{1} << (page % 64), __ATOMIC_RELAXED);
    }
  }
}

bool IsTracked(uint64_t begin, uint64_t end) {
  for (const TrackedRange& range : state.tracked) {
    if (__atomic_load_n(&range.end, __ATOMIC_SEQ_CST) > begin && range.begin < end) return true;
  }
  return false;
}

namespace {

// While others wait for us nobody may keep us from a core. Where the process may not do this
// (CAP_SYS_NICE) it has no effect.
void Hurry(bool on) {
  constexpr long kOther = 0, kFifo = 1;
  const int priority = on ? 1 : 0;
  Call(__NR_sched_setscheduler, 0, on ? kFifo : kOther, Address(&priority));
}

// Both locks, and a core, for as long as it lives.
class WindowTurn {
 public:
  WindowTurn() {
    locks.window.Acquire();
    locks.address_space.Acquire();
    Hurry(true);
  }
  WindowTurn(const WindowTurn&) = delete;
  WindowTurn& operator=(const WindowTurn&) = delete;
  ~WindowTurn() {
    Hurry(false);
    locks.address_space.Release();
    locks.window.Release();
  }
};

}  // namespace

WindowResult SwapFrozen(const Descriptors& fds, const WindowPiece* pieces, uint32_t count,
                        uint64_t dirty_limit, int64_t stop_limit_ns, WindowRoom& room) {
  const WindowTurn turn;
  return SwapFrozenLocked(fds, pieces, count, dirty_limit, stop_limit_ns, room);
}

WindowResult SwapGuarded(const Descriptors& fds, const WindowPiece& piece, uint64_t dirty_limit,
                         int64_t stop_limit_ns, WindowRoom& room) {
  const WindowTurn turn;
  WindowResult result;
  ServeEventsLocked(fds);
  uint32_t parts = 0;
  if (CollectParts(fds, &piece, 1, room, parts, result.skipped) == 0 && parts == 0) {
    result.outcome = WindowResult::kSwapped;  // by an attempt before; or gone
  } else if (!MayGuard(fds, piece)) {
    result.outcome = WindowResult::kUnguardable;
  } else if (!EverybodyPassed(fds, stop_limit_ns, result)) {
    result.outcome = WindowResult::kBusy;
  } else {
    result = SwapGuardedLocked(fds, piece, dirty_limit, room);
  }
  return result;
}

MappedParts FindMappedFrozen(const Descriptors& fds, int64_t stop_limit_ns, MappedPart* parts,
                             uint32_t room) {
  const WindowTurn turn;
  MappedParts found;
  found.open = OpenServing(fds, stop_limit_ns).open;
  if (!found.open) return found;
  found.whole = true;
  kernel::ProcmapQuery vma;
  for (uint64_t at = 0; QueryVma(fds, at, vma, kernel::kProcmapQueryFileBacked); at = vma.vma_end) {
    if (!IsImage(vma) || !IsWatched(fds, vma.vma_start)) continue;
    found.whole = found.count < room;
    if (!found.whole) break;
    parts[found.count++] = {vma.vma_start, vma.vma_end, DeviceOf(vma), vma.inode, vma.vma_offset};
  }
  CloseWindow();
  return found;
}

void ServeEvents(const Descriptors& fds) {
  constexpr int64_t kPause = 1'000'000;
  locks.address_space.Acquire();
  const bool served = ServeEventsLocked(fds);  // unless answered by a window meanwhile
  locks.address_space.Release();
  if (!served) raw::Sleep(kPause);  // they wait
}

void ResetWindowsAfterFork() {
  locks.window.Reset();
  locks.address_space.Reset();
  for (uint32_t i = 0; i < state.mirror_count; ++i) {
    const MirrorPlace& place = state.mirrors[i];
    // SAFETY: our own staging memory, copied into this child by fork; nobody uses it here.
    Call(__NR_munmap, Word(place.base), Word(place.end - place.begin));
  }
  state.mirror_count = 0;
  state.image_count = 0;
  for (TrackedRange& range : state.tracked) range.end = 0;
}

}  // namespace unmoor::local
