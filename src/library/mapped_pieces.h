// What a DirectMap has mapped, for the remapper: which memory is which part of which layer.
//
// Pages of a delta that were copied in instead of mapped belong to no piece: they are the process's
// own already. Values; the layers are shared and stay open as long as a piece is held.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer_reader.h"
#include "unmoor/direct_map.h"

namespace unmoor {
inline namespace v1 {

// A LayerReader that several threads may ask for its hashes.
class SharedLayer {
 public:
  explicit SharedLayer(LayerReader reader) : reader_(std::move(reader)) {}

  [[nodiscard]] const LayerReader& reader() const { return reader_; }
  // Before VerifyBlocks or BlockMatches of the reader; idempotent.
  [[nodiscard]] Result<> LoadHashes() const;

 private:
  mutable LayerReader reader_;  // changed by LoadHashes only, and by that once
  mutable std::mutex mutex_;
};

struct MappedPiece {
  VaddrRange memory;  // of this process
  FileOffset offset;  // of memory.begin in the layer's .pages
  std::shared_ptr<const SharedLayer> layer;
};

// As mapped at first, ascending by memory: pieces the remapper has swapped since are still listed.
[[nodiscard]] std::vector<MappedPiece> PiecesOf(const DirectMap& map);

}  // namespace v1
}  // namespace unmoor
