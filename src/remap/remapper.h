// The batch state machine: moves direct-mapped areas to anonymous memory while the program runs.
//
//   Idle → Copied (unguarded; again for pages written meanwhile)
//        → Guarded → Rechecked (pages written since, copied again) → Swapped → Idle of the next
//        batch
//                 ↘ Busy, TooDirty, Stale: released unswapped, tried again or planned anew
//
// Invariant: a batch is swapped only in a window in which no thread can write, after every page
// written since its copy was copied again; the Carrier guarantees both, in one indivisible call.
// At any instant the program sees either the old mapping or the new one, both whole.
//
// Single-threaded: one Remapper and its Carrier belong to one thread. A failure leaves the program
// with right memory, some areas anonymous and the rest direct-mapped.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "remap/plan.h"
#include "remap/range_set.h"

namespace unmoor {

// An area up to this size is never swapped in parts, unless it is too hot: one that is anonymous in
// part is two VMAs for the time being, and mremap of all of it fails.
inline constexpr Bytes kWholeArea(uint64_t{64} << 20);

// A part of an area that is copied and swapped as a whole. `blocks` cut at 2 MiB.
struct Piece {
  size_t area = 0;
  VaddrRange range;
};

struct CopyStep {
  VaddrRange block;
  BlockContent content;
  bool huge = false;  // give it a huge page
};

enum class SwapResult {
  kSwapped,
  kBusy,      // a thread would not stop, or an event waits: handle events, try again
  kTooDirty,  // more was written than fits into the pause
  kStale,     // the address space is not what the plan thinks: plan anew
};

struct SwapOutcome {
  SwapResult result = SwapResult::kBusy;
  Nanos pause;
  PageCount recopied;
};

// What the state machine needs done, by whatever means: from outside by a helper (agent), in
// process by a thread, in tests by a simulated memory.
class Carrier {
 public:
  virtual ~Carrier() = default;

  struct PlannedArea {
    Area area;
    RangeSet image_data;  // addresses whose page the image holds
  };
  // The direct-mapped areas as they are now, each with its mirror in place.
  [[nodiscard]] virtual Result<std::vector<PlannedArea>> Plan() = 0;
  // Lets the program's pending events happen; true when the plan no longer holds.
  [[nodiscard]] virtual Result<bool> HandleEvents() = 0;
  // Addresses the program gave back since the image was mapped; changes only in
  // HandleEvents and Swap.
  [[nodiscard]] virtual const RangeSet& dropped() const = 0;

  [[nodiscard]] virtual Result<std::vector<VaddrRange>> OwnPages(VaddrRange range,
                                                                 bool written_only) = 0;
  // Into the mirror, unguarded.
  [[nodiscard]] virtual Result<> Copy(size_t area, std::span<const CopyStep> steps) = 0;
  [[nodiscard]] virtual Result<> CopyAgain(size_t area, std::span<const VaddrRange> pages) = 0;
  // Guard, recheck, swap, release: one call that is complete or without effect.
  [[nodiscard]] virtual Result<SwapOutcome> Swap(std::span<const Piece> pieces,
                                                 PageCount dirty_limit) = 0;
  virtual void Pause(Nanos time) = 0;  // waits, handling nothing
};

struct RemapCounts {
  Bytes total;
  Bytes done;
  uint64_t windows = 0;
  uint64_t aborted = 0;
  Nanos longest_pause;
};

class Remapper {
 public:
  Remapper(Carrier& carrier, Nanos max_pause, bool huge_pages);

  // Until nothing is direct-mapped. `progress` is called after each batch.
  [[nodiscard]] Result<> Run(const std::function<void(const RemapCounts&)>& progress);
  [[nodiscard]] const RemapCounts& counts() const { return counts_; }

 private:
  enum class Next { kContinue, kReplan };
  [[nodiscard]] Result<bool> RunPlan(const std::function<void(const RemapCounts&)>& progress);
  [[nodiscard]] std::vector<Piece> TakeBatch();
  [[nodiscard]] bool IsSmallArea(const Piece& piece) const;
  // Shortens the batch where its swap would take too long.
  [[nodiscard]] Result<Next> CopyBatch(std::vector<Piece>& batch);
  [[nodiscard]] std::optional<Vaddr> WhereTooMuchIsFreed(const Piece& piece, const RangeSet& own,
                                                         bool is_first, Bytes& freed) const;
  [[nodiscard]] Result<Next> CopyPiece(const Piece& piece, const RangeSet& own);
  [[nodiscard]] Result<PageCount> RefreshBatch(std::span<const Piece> batch);
  [[nodiscard]] Result<Next> SwapBatch(std::vector<Piece> batch);
  [[nodiscard]] bool KeepHalf(std::vector<Piece>& batch);
  void GiveBack(std::span<const Piece> pieces);
  void GiveBackFrom(Vaddr cut, Piece& piece);
  void CountSwapped(std::span<const Piece> pieces);

  Carrier& carrier_;
  Pacer pacer_;
  bool huge_pages_;
  std::vector<Carrier::PlannedArea> areas_;
  std::vector<Piece> todo_;  // last is next
  RemapCounts counts_;
};

}  // namespace unmoor
