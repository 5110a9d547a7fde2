// Overlay: which layer holds which page of a VMA that has deltas.
//
// Pure: from the manifest and the layers' tables. Also the place where both are held against each
// other: a VMA lies inside one extent of each layer it names, exactly where the manifest says.
// Document: docs/format.md, "Deltas".
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
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

 private:
  // The segments of `layer` inside `range`, whose first page is at `offset`.
  [[nodiscard]] Result<std::vector<OverlayRun>> Segments(uint32_t vpid, VaddrRange range,
                                                         uint32_t layer, FileOffset offset) const;

  std::vector<const LayerInfo*> layers_;
  std::vector<std::map<std::pair<uint32_t, Vaddr>, const Extent*>> extents_;
  std::string directory_;
};

}  // namespace unmoor
