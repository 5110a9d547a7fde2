// LocalCarrier: the batch state machine's hands inside one's own process.
//
// One LocalCarrier and its Remapper belong to one copying thread; those of one remapper share a
// RemapShare (mirrors, what was refused). Copies go unguarded into a mirror, windows through
// window.h. Everything that may allocate happens outside windows.
//
// A failure leaves the program with right memory, some areas anonymous and the rest direct-mapped.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer_reader.h"
#include "os/fd.h"
#include "os/memory_room.h"
#include "os/own_process.h"
#include "remap/local/watcher.h"
#include "remap/remapper.h"

namespace unmoor::local {

struct ScopeRange {
  VaddrRange memory;
  bool guarded = false;  // by fault; otherwise all threads rest
};

// Which file memory was mapped from, where the caller knows.
struct ImageSource {
  VaddrRange memory;
  FileOffset offset;                         // of memory.begin
  std::shared_ptr<const LayerReader> layer;  // hashes loaded
};

enum class CopyOrder { kGiven, kSequential, kHotFirst };

struct LocalOptions {
  Nanos max_pause{1'000'000};
  CopyOrder order = CopyOrder::kGiven;
  bool huge_pages = true;
  bool verify = true;
  // Called between copies, without locks, with the bytes copied since: keeps the pace, waits while
  // paused. An error ends the run.
  std::function<Result<>(Bytes)> gate;
};

// What the carriers of one remapper share. Thread-safe. With it ends the watch over what is still
// direct-mapped.
class RemapShare {
 public:
  // `verify`: images are opened with their hashes.
  RemapShare(std::shared_ptr<Watcher> watcher, std::vector<ScopeRange> scope,
             std::vector<ImageSource> sources, bool verify);
  ~RemapShare();
  RemapShare(const RemapShare&) = delete;
  RemapShare& operator=(const RemapShare&) = delete;

  [[nodiscard]] Watcher& watcher() { return *watcher_; }
  // Watches all that is direct-mapped in the scope, from here on and before anything is copied.
  [[nodiscard]] Result<> WatchScope();
  // Whether `area`, outside of every remapper's scope, was in ours before the program moved it. The
  // first who asks has it.
  [[nodiscard]] bool AdoptMoved(const Area& area);
  // What of ours is direct-mapped still, wherever the program has moved it, and not refused. Stops
  // all threads for a moment; fails with EBUSY when they do not come to rest.
  [[nodiscard]] Result<std::vector<VaddrRange>> FindMapped();
  // The place where `area` (or an area it was cut from) is staged.
  [[nodiscard]] Result<MirrorPlace> MirrorFor(const Area& area);

  // An image as the carriers read it.
  struct Image {
    Fd opened;
    int fd = -1;  // -1: read through the mapping
    std::string path;
    std::shared_ptr<const LayerReader> layer;  // null: nothing to verify with
  };
  [[nodiscard]] const Image* ImageOf(const Area& area);

  // What copies take.
  [[nodiscard]] MemoryRoom& memory_room() { return memory_room_; }

  // `range` stays direct-mapped for ever.
  void Refuse(VaddrRange range, const std::string& reason);
  [[nodiscard]] RangeSet refused() const;
  [[nodiscard]] std::string refusal() const;
  [[nodiscard]] size_t refusals() const;

 private:
  struct Mirror {
    Area area;
    ReservedMemory reserved;
  };
  // What of `range` is in the scope or adopted.
  [[nodiscard]] std::vector<VaddrRange> KnownParts(VaddrRange range) const;
  [[nodiscard]] Result<Mirror> MakeMirror(const Area& area) const;
  [[nodiscard]] Image OpenImage(const Area& area) const;

  std::shared_ptr<Watcher> watcher_;
  const std::vector<ScopeRange> scope_;
  const std::vector<ImageSource> sources_;
  const bool verify_;
  MemoryRoom memory_room_;
  mutable std::mutex mutex_;
  std::vector<Mirror> mirrors_;
  std::vector<Area> watched_;  // as WatchScope found them
  std::vector<VaddrRange> adopted_;
  std::vector<std::pair<Area, std::unique_ptr<Image>>> images_;
  RangeSet refused_;
  std::string refusal_;
  size_t refusals_ = 0;
};

class LocalCarrier final : public Carrier {
 public:
  LocalCarrier(std::shared_ptr<RemapShare> share, std::vector<ScopeRange> scope,
               LocalOptions options);
  ~LocalCarrier() override;
  LocalCarrier(const LocalCarrier&) = delete;
  LocalCarrier& operator=(const LocalCarrier&) = delete;

  [[nodiscard]] Nanos longest_guard() const { return longest_guard_; }

  // Carrier
  Result<std::vector<PlannedArea>> Plan() override;
  Result<bool> HandleEvents() override;
  const RangeSet& dropped() const override { return none_; }
  Result<std::vector<VaddrRange>> OwnPages(VaddrRange range, bool written_only) override;
  Result<> Copy(size_t area, std::span<const CopyStep> steps) override;
  Result<> CopyAgain(size_t area, std::span<const VaddrRange> pages) override;
  Result<SwapOutcome> Swap(std::span<const Piece> pieces, PageCount dirty_limit) override;
  void Pause(Nanos time) override;

 private:
  struct Planned {
    PlannedArea planned;
    MirrorPlace mirror;
    const RemapShare::Image* image = nullptr;
    bool guarded = false;
    [[nodiscard]] Vaddr At(Vaddr original) const {
      return Vaddr(mirror.base + (original.value - mirror.begin));
    }
  };

  [[nodiscard]] Result<> PlanOnce();
  [[nodiscard]] Result<> PlanPart(const Area& whole, VaddrRange part, bool guarded);
  // What of `area` lies behind the end of its file.
  [[nodiscard]] VaddrRange RefuseTruncated(const Area& area, const RemapShare::Image& image);
  [[nodiscard]] RangeSet DataOf(const Area& area, const RemapShare::Image& image) const;
  void SortPlan();
  [[nodiscard]] Result<> AdoptMoved(const Area& area, const RangeSet& refused);
  [[nodiscard]] Result<> CheckNoPinnedMemory();
  [[nodiscard]] Result<> TakeMemory(std::span<const CopyStep> steps);
  [[nodiscard]] Result<> EnsureScratch();
  [[nodiscard]] Result<> CopyHuge(const Planned& target, const CopyStep& step);
  [[nodiscard]] Result<> CopyContent(const Planned& target, const BlockContent& content,
                                     Vaddr block, Vaddr to);
  [[nodiscard]] Result<> ReadImage(const Planned& target, VaddrRange pages, Vaddr to);
  [[nodiscard]] Result<> ReadBlock(const Planned& target, FileOffset block, VaddrRange pages,
                                   Vaddr to);
  void RefuseBlock(const Planned& target, Vaddr at, FileOffset offset, const char* problem);
  [[nodiscard]] Result<> CopyOwn(VaddrRange pages, Vaddr to);
  [[nodiscard]] int64_t StopLimit() const;
  [[nodiscard]] WindowPiece PieceOf(size_t area, VaddrRange range) const;
  [[nodiscard]] Result<SwapOutcome> Conclude(const WindowResult& result);
  [[nodiscard]] Result<SwapOutcome> SwapGuardedPieces(std::span<const WindowPiece> pieces,
                                                      PageCount dirty_limit);

  std::shared_ptr<RemapShare> share_;
  std::vector<ScopeRange> scope_;
  LocalOptions options_;
  Fd staging_;  // UFFDIO_MOVE into mirrors
  bool can_move_ = false;
  ReservedMemory scratch_;
  std::vector<std::byte> bounce_;
  std::vector<Planned> plan_;
  const RangeSet none_;
  std::unique_ptr<WindowRoom> room_;
  std::vector<WindowPiece> frozen_pieces_, guarded_pieces_;
  bool stale_ = false;
  bool end_run_ = false;
  int lateness_ = 0;  // grows with windows in vain
  Nanos busy_since_;  // zero: not

  Nanos last_pin_check_;
  bool ring_seen_ = false;
  Nanos longest_guard_;
};

}  // namespace unmoor::local
