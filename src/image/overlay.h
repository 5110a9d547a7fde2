// Overlay: which layer holds which page of a VMA that has deltas.
//
// Pure: from the manifest and the layers' tables. Also the place where both are held against each
// other: in each layer it names, a VMA's place in the file touches one extent only, at the same
// distance as the addresses (of another task where forked memory is shared). It may reach beyond
// that extent into the gaps around it, which read zero.
// Document: docs/format.md, "Deltas".
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer.h"
#include "image/manifest.h"

namespace unmoor {

// Pages of a VMA that come from one place.
struct OverlayRun {
  VaddrRange range;
  uint32_t layer = 0;  // index into Manifest::layers
  FileOffset offset;   // of range.begin
  bool operator==(const OverlayRun&) const = default;
};

// Each page by the topmost layer that holds it; ascending, apart.
struct VmaPages {
  std::vector<OverlayRun> all;     // pages in no run are zeros
  std::vector<OverlayRun> deltas;  // those not from the VMA's own layer
  Bytes data;                      // sum of `all`
};

// Answers for many VMAs of one manifest. `layers[i]` is the manifest's layer i; it must outlive
// this.
class Overlay {
 public:
  // `directory` is for messages.
  Overlay(std::span<const LayerInfo* const> layers, std::string directory);

  // An error when the manifest and an index disagree about the VMA (of kind kMapped) of task
  // `vpid`.
  [[nodiscard]] Result<VmaPages> Resolve(uint32_t vpid, const ManifestVma& vma) const;

  // Whether a program that maps the VMA's own layer and then grows the VMA finds zeros: what the
  // layer has behind it is none of a VMA that was longer once, nor of its neighbour.
  [[nodiscard]] bool GrowsIntoZeros(const ManifestVma& vma) const;

  // The same layers for a VMA that has become another range (grown, cut, moved bounds); nothing
  // when one of them has no room for it, or the VMA could not grow into zeros.
  [[nodiscard]] std::optional<ManifestVma> Reach(const ManifestVma& vma, VaddrRange range) const;

 private:
  // The one extent that `range` touches when its first page is at `offset`; null: none, or not
  // where it should be.
  [[nodiscard]] const Extent* FindExtent(VaddrRange range, uint32_t layer, FileOffset offset) const;
  // The segments of `layer` inside `range`, whose first page is at `offset`.
  [[nodiscard]] Result<std::vector<OverlayRun>> Segments(uint32_t vpid, VaddrRange range,
                                                         uint32_t layer, FileOffset offset) const;

  std::vector<const LayerInfo*> layers_;
  std::string directory_;
};

}  // namespace unmoor
