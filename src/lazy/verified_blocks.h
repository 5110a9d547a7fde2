// VerifiedBlocks: the pages of layers, each block held against its hash before anybody sees it.
//
// One thread. A block that cannot be read whole, or does not match, is an error that names the file
// and the offset; never zeros. Document: docs/format.md, "Hash".
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer_reader.h"

namespace unmoor {

class VerifiedBlocks {
 public:
  // Their hashes are loaded.
  explicit VerifiedBlocks(const std::vector<LayerReader>& layers);

  // The 64 KiB block that holds `at`; until the next call.
  [[nodiscard]] Result<std::span<const std::byte>> Block(uint32_t layer, FileOffset at);

 private:
  const std::vector<LayerReader>& layers_;
  std::vector<std::byte> block_;
  // What is in it, if anything.
  const LayerReader* layer_ = nullptr;
  FileOffset offset_;
};

}  // namespace unmoor
