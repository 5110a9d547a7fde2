// A Carrier over the interleaved machine: freeze by rendezvous or guard by fault, in indivisible
// steps as the in-process engine and the agent do them, with any other actor moving between two
// steps. The real Remapper drives it.
#pragma once

#include <vector>

#include "interleaved_machine.h"
#include "remap/remapper.h"

namespace unmoor::interleaving {

class InterleavedCarrier final : public Carrier {
 public:
  explicit InterleavedCarrier(Machine& machine) : machine_(machine) {}

  Result<std::vector<PlannedArea>> Plan() override;
  Result<bool> HandleEvents() override;
  const RangeSet& dropped() const override { return dropped_; }
  Result<std::vector<VaddrRange>> OwnPages(VaddrRange range, bool written_only) override;
  Result<> Copy(size_t area, std::span<const CopyStep> steps) override;
  Result<> CopyAgain(size_t area, std::span<const VaddrRange> pages) override;
  Result<SwapOutcome> Swap(std::span<const Piece> pieces, PageCount dirty_limit) override;
  void Pause(Nanos time) override;

 private:
  [[nodiscard]] bool Has(Mutation mutation) const {
    return machine_.scenario().mutation == mutation;
  }
  void CopyPage(int page);
  bool StopAllThreads();
  SwapResult SwapFrozen(std::span<const Piece> pieces);
  SwapResult SwapGuarded(std::span<const Piece> pieces);
  bool LetEverybodyPass();
  bool SwapUnderGuard(const Piece& piece);
  void Recheck(const Piece& piece);
  void SwapPiece(const Piece& piece);

  Machine& machine_;
  RangeSet dropped_;
};

}  // namespace unmoor::interleaving
