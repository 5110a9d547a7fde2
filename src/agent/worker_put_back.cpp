// The worker's other direction: a program that is independent of its image maps it again wherever
// that shows what the program has, for as long as a dump takes. See put_back.h.
//
//   baseline   the batch is write-protected, asynchronously: from here on what is written is told
//   compare    each 2 MiB block with the layer, page by page, while the program runs; pages that
//              differ go into a private mapping of the layer, the mirror
//   window     as of the remap: all threads stopped, pages written since the baseline copied once
//              more, then the mirror's block is moved over the program's by one mremap
//
// So a block is exchanged only for what was compared after the baseline and is known not to have
// changed since. What a layer shows of a VMA is exchanged as a whole or not at all, up to 64 MiB
// (as in the remap), and not at all where it is a part only of a small one: of a VMA that is two,
// mremap fails. Where that is not known (memory was given back or moved meanwhile, too much was
// written, a thread does not stop) it stays as it is, and the dump reads it. Killed at any moment
// the program is direct-mapped in part, which is what the next worker finds.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "agent/worker.h"
#include "agent/worker_ops.h"
#include "base/log.h"
#include "os/file.h"
#include "os/own_memory.h"
#include "os/pagemap.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/remote_memory.h"
#include "os/userfaultfd.h"

namespace unmoor {
namespace {

constexpr Bytes kFirstBatch(uint64_t{8} << 20);
constexpr Bytes kMostBatch(uint64_t{32} << 20);
constexpr uint64_t kMostDiffering = 4;            // of the pages of a block, one in so many
constexpr uint64_t kMostDifferingOfWhole = 2;     // of a VMA exchanged as a whole
constexpr size_t kMostPieces = 16;                // of a window, as in the remap
constexpr Bytes kNeverInPart(uint64_t{8} << 20);  // a VMA of which a layer shows only a part
constexpr int kAttempts = 20;
constexpr Nanos kBusyPatience(3'000'000'000);  // for threads that do not stop, of all windows
constexpr size_t kSpareMaps = 256;  // for mirrors, and for what the program maps meanwhile
constexpr Nanos kBusyPause(1'000'000);

RangeSet ToSet(const std::vector<VaddrRange>& ranges) {
  RangeSet set;
  for (const VaddrRange range : ranges) set.Insert(range);
  return set;
}

std::vector<Piece> JoinBlocks(const std::vector<VaddrRange>& blocks) {
  std::vector<Piece> pieces;
  for (const VaddrRange block : blocks) {
    if (!pieces.empty() && pieces.back().range.end == block.begin) {
      pieces.back().range.end = block.end;
    } else {
      pieces.push_back({0, block});
    }
  }
  return pieces;
}

}  // namespace

Result<> Worker::PutBack(const std::vector<ShownByLayer>& ranges) {
  UNMOOR_TRY(CheckNoPinnedMemory());
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadSmaps(pid_));
  Pacer pacer(options_.max_pause, kFirstBatch, kMostBatch);
  put_back_patience_ = kBusyPatience;
  size_t mappings = vmas.size() + kSpareMaps;
  for (const ShownByLayer& shown : ranges) {
    const auto vma = std::ranges::find_if(vmas, [&](const VmaInfo& v) {
      return v.IsPrivateAnonymous() && v.range.Contains(shown.range);
    });
    if (vma == vmas.end() || (vma->prot & PROT_READ) == 0) continue;
    // Changed since: what grew by mremap may do so again.
    if (vma->range != shown.range && vma->range.size() <= kNeverInPart) continue;
    mappings += CutIntoBlocks(shown.range).size();  // when every other block stays
    if (mappings > MaxMapCount()) {
      return MachineError("the program may not have the mappings for it; raise vm.max_map_count");
    }
    UNMOOR_TRY(BeginPutBack(shown, *vma));
    const auto put_back = PutBackArea(pacer);
    UNMOOR_TRY(EndPutBack());
    UNMOOR_TRY(put_back);
  }
  return {};
}

// As a plan of one area, all of which counts as given back: it is anonymous.
Result<> Worker::BeginPutBack(const ShownByLayer& shown, const VmaInfo& vma) {
  UNMOOR_ASSIGN(Fd file, OpenFile(shown.file, O_RDONLY));
  UNMOOR_ASSIGN(const struct stat info, StatFd(file.get(), shown.file));
  VmaInfo image = vma;
  image.range = shown.range;
  image.offset = shown.offset;
  image.dev_major = major(info.st_dev);
  image.dev_minor = minor(info.st_dev);
  image.inode = info.st_ino;
  image.name = shown.file;
  Area area{image.range,     image.prot,      image.vm_flags, image.inode,
            image.dev_major, image.dev_minor, image.range,    image.offset.value};
  UNMOOR_ASSIGN(PlannedArea planned, PlanData(area, file.get()));
  UNMOOR_ASSIGN(const Vaddr base, MapOwned(area.range.size(), area.range.begin.value, true));
  UNMOOR_TRY(MapLayer(area, base, file.get()));
  UNMOOR_TRY(UffdRegister(uffd_.get(), area.range, UffdMode::kWriteProtect));
  put_back_file_ = std::move(file);
  images_.push_back(std::move(image));
  dropped_.Insert(area.range);
  areas_.assign(1, std::move(planned));
  put_back_mirror_ = Mirror{std::move(area), base};
  return {};
}

// Writable until it is swapped in; the program's children do not get it.
Result<> Worker::MapLayer(const Area& area, Vaddr base, int file) {
  UNMOOR_ASSIGN(const int helper_fd, link_.GiveFd(file));
  OpList map;
  map.Syscall(SYS_mmap, {base.value, area.range.size().value, PROT_READ | PROT_WRITE,
                         static_cast<uint64_t>(MAP_PRIVATE | MAP_FIXED |
                                               (area.HasFlag("nr") ? MAP_NORESERVE : 0)),
                         static_cast<uint64_t>(helper_fd), area.offset});
  map.Syscall(SYS_close, {static_cast<uint64_t>(helper_fd), 0, 0, 0, 0, 0});
  const VaddrRange mirror{base, base + area.range.size()};
  AddAdvice(map, mirror, MADV_DONTFORK);
  for (const FlagAdvice& f : kFlagAdvice) {
    if (f.advice != MADV_DONTFORK && area.HasFlag(f.flag)) AddAdvice(map, mirror, f.advice);
  }
  return link_.Must(map, "cannot map a layer inside the program").map([](int64_t) {});
}

// What was not put back is no longer watched.
Result<> Worker::EndPutBack() {
  const Area area = areas_.front().area;
  for (const VaddrRange left : dropped_.Inside(area.range)) {
    (void)UffdUnregister(uffd_.get(), left);  // it may be gone
  }
  dropped_.Erase(area.range);
  areas_.clear();
  put_back_file_.Reset();
  const Mirror mirror = *std::exchange(put_back_mirror_, std::nullopt);
  return ReleaseMirror(mirror);
}

Result<> Worker::PutBackArea(Pacer& pacer) {
  const VaddrRange whole = areas_.front().area.range;
  if (whole.size() <= kWholeArea) return PutBackBatch(whole, pacer);
  const std::vector<VaddrRange> blocks = CutIntoBlocks(whole);
  for (auto block = blocks.begin(); block != blocks.end() && !program_ended();) {
    VaddrRange batch{block->begin, block->begin};
    while (block != blocks.end() && (batch.empty() || batch.size() < pacer.batch_size())) {
      batch.end = (block++)->end;
    }
    UNMOOR_TRY(PutBackBatch(batch, pacer));
  }
  return {};
}

Result<> Worker::PutBackBatch(VaddrRange batch, Pacer& pacer) {
  // Nobody has pages still to empty whose event was read before.
  UNMOOR_TRY(HandleEvents());
  UNMOOR_TRY(Settle());
  touched_ = RangeSet();
  const auto own = ScanPages(pagemap_.get(), batch, PageQuery::kOwn, true);
  if (!own) return {};  // unmapped by now
  const RangeSet owned = ToSet(*own);
  const bool uncut = batch == areas_.front().area.range;
  const auto most = [&](VaddrRange range) {
    return Bytes(range.size().value / (uncut ? kMostDifferingOfWhole : kMostDiffering));
  };
  std::vector<VaddrRange> alike;
  Bytes differing;
  for (const VaddrRange block : CutIntoBlocks(batch)) {
    UNMOOR_ASSIGN(const auto differs,
                  CompareBlock(block, owned, uncut ? block.size() : most(block)));
    if (!differs && uncut) return {};
    if (!differs) continue;
    differing += *differs;
    if (uncut && differing > most(batch)) return {};
    alike.push_back(block);
  }
  const std::vector<Piece> pieces = JoinBlocks(alike);
  for (size_t i = 0; i < pieces.size(); i += kMostPieces) {
    const size_t count = std::min(kMostPieces, pieces.size() - i);
    UNMOOR_TRY(ExchangePieces(std::span(pieces).subspan(i, count), pacer));
  }
  return {};
}

// What the layer does not show of it, and that is then in the mirror. None: it is more than `most`,
// or unmapped by now.
Result<std::optional<Bytes>> Worker::CompareBlock(VaddrRange block, const RangeSet& own,
                                                  Bytes most) {
  const PlannedArea& planned = areas_.front();
  std::vector<std::byte>& ours = put_back_bytes_[0];
  std::vector<std::byte>& layers = put_back_bytes_[1];
  ours.assign(block.size().value, std::byte{0});
  layers.assign(block.size().value, std::byte{0});
  const auto part = [&](std::vector<std::byte>& bytes, VaddrRange range) {
    return std::span(bytes).subspan((range.begin - block.begin).value, range.size().value);
  };
  for (const VaddrRange range : own.Inside(block)) {
    if (!ReadMemory(pid_, range.begin, part(ours, range))) return std::optional<Bytes>();
  }
  for (const VaddrRange range : planned.image_data.Inside(block)) {
    UNMOOR_TRY(ReadExactlyAt(put_back_file_.get(), part(layers, range),
                             planned.area.OffsetOf(range.begin), images_.back().name));
  }
  RangeSet differing;
  for (Vaddr at = block.begin; at < block.end; at = at + Bytes(kPageSize)) {
    const VaddrRange page{at, at + Bytes(kPageSize)};
    if (std::memcmp(part(ours, page).data(), part(layers, page).data(), kPageSize) != 0) {
      differing.Insert(page);
    }
  }
  if (differing.SizeWithin(block) > most) return std::optional<Bytes>();
  for (const VaddrRange range : differing.Inside(block)) {
    UNMOOR_TRY(WriteMemory(link_.helper().pid, MirrorOf(0).At(range.begin), part(ours, range)));
  }
  return std::optional<Bytes>(differing.SizeWithin(block));
}

// Of blocks compared since their baseline; or nothing, where that is not sure. On a busy machine a
// thread may lack a CPU to stop on: to wait for it costs the program less than to have the dump
// read everything while nothing runs.
Result<> Worker::ExchangePieces(std::span<const Piece> pieces, Pacer& pacer) {
  for (int attempt = 0; attempt < kAttempts && !program_ended(); ++attempt) {
    const Nanos began = MonotonicNow();
    UNMOOR_TRY(HandleEvents());
    for (const Piece& piece : pieces) {
      UNMOOR_ASSIGN(const std::vector<VaddrRange> written, OwnPages(piece.range, true));
      if (!written.empty()) UNMOOR_TRY(CopyAgain(0, written));
    }
    UNMOOR_ASSIGN(const SwapOutcome outcome, Swap(pieces, pacer.dirty_limit()));
    switch (outcome.result) {
      case SwapResult::kSwapped:
        pacer.Swapped(outcome.pause);
        return {};
      case SwapResult::kStale:
        return {};
      case SwapResult::kTooDirty:
        pacer.TooDirty();
        break;
      case SwapResult::kBusy:
        Pause(kBusyPause);
        if (put_back_patience_ > Nanos(0)) --attempt;
        put_back_patience_ = put_back_patience_ - (MonotonicNow() - began);
        break;
    }
  }
  return {};
}

}  // namespace unmoor
