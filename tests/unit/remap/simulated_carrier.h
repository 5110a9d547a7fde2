// A Carrier over a simulated program, doing step by step what the agent's worker does, and letting
// the program act between any two steps. `Faults` takes single safeguards out, so that tests can
// show that the model would notice their loss.
#pragma once

#include <functional>
#include <vector>

#include "remap/remapper.h"
#include "simulated_program.h"

namespace unmoor::simulation {

struct Faults {
  bool no_recheck = false;     // swaps without copying what was written meanwhile
  bool no_guard = false;       // the program runs between recheck and swap
  bool no_checks = false;      // swaps although the mappings are not as planned
  bool keep_copies = false;    // what was copied of memory given back is not forgotten
  bool drop_late = false;      // lets the caller of MADV_DONTNEED go before dropping the image
  bool never_stopped = false;  // memory given back again may be copied before it is empty
};

class SimulatedCarrier final : public Carrier {
 public:
  SimulatedCarrier(Program& program, Faults faults, std::function<void()> yield)
      : program_(program), faults_(faults), yield_(std::move(yield)) {}

  // When set and true, a thread does not stop in time, or too much was written.
  std::function<bool()> refuses_to_stop;
  std::function<bool()> too_dirty;
  std::function<void(uint64_t)> swapped;  // told how many of the program's own pages it replaced
  int plans_with_areas_twice = 0;         // as of a list of mappings torn between two reads

  Result<std::vector<PlannedArea>> Plan() override;
  Result<bool> HandleEvents() override;
  const RangeSet& dropped() const override { return dropped_; }
  Result<std::vector<VaddrRange>> OwnPages(VaddrRange range, bool written_only) override;
  Result<> Copy(size_t area, std::span<const CopyStep> steps) override;
  Result<> CopyAgain(size_t area, std::span<const VaddrRange> pages) override;
  Result<SwapOutcome> Swap(std::span<const Piece> pieces, PageCount dirty_limit) override;
  void Pause(Nanos time) override;

 private:
  struct Mirror {
    Area area;
    std::map<uint64_t, uint64_t> pages;
  };
  [[nodiscard]] Mirror& MirrorFor(const Area& area);
  [[nodiscard]] bool IsAsPlanned(const Area& area, VaddrRange range);
  [[nodiscard]] bool CopyOwn(Mirror& mirror, VaddrRange range);
  bool Recheck(const Piece& piece, uint64_t& limit);
  [[nodiscard]] uint64_t CountOwn(VaddrRange range) const;
  void SwapPiece(const Piece& piece);
  [[nodiscard]] bool GivesBackAgain() const;
  void HandleEventsStopped(bool& changed);
  void Drop(PageRange range);

  Program& program_;
  Faults faults_;
  std::function<void()> yield_;
  std::vector<PlannedArea> areas_;
  std::deque<Mirror> mirrors_;
  RangeSet dropped_;
  bool stale_ = false;
};

}  // namespace unmoor::simulation
