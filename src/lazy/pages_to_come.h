// PagesToCome: the pages of an address space that still have to be brought, and where from.
//
// A value. It follows what the program does to its memory: pages that have come or were given back
// are taken out, moved ones move. A page in no run is one of zeros, or is there already.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>

#include "base/units.h"
#include "image/overlay.h"

namespace unmoor {

class PagesToCome {
 public:
  PagesToCome() = default;
  explicit PagesToCome(std::span<const OverlayRun> runs);

  // The run that holds `at`.
  [[nodiscard]] std::optional<OverlayRun> Find(Vaddr at) const;
  // What is left of the run that holds `at`, or the first one above it.
  [[nodiscard]] std::optional<OverlayRun> Next(Vaddr at) const;

  // `run` is disjoint from all others.
  void Add(const OverlayRun& run);
  void Take(VaddrRange range);
  // What was to come to `from` is to come to the same places from `to` on; what was to come there
  // is not.
  void Move(VaddrRange from, Vaddr to);

  [[nodiscard]] bool empty() const { return runs_.empty(); }
  [[nodiscard]] Bytes left() const { return left_; }

 private:
  std::map<Vaddr, OverlayRun> runs_;  // by their begin
  Bytes left_;
};

}  // namespace unmoor
