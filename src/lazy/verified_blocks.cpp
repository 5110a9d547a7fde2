// See verified_blocks.h.
#include "lazy/verified_blocks.h"

#include "image/layout.h"
#include "os/file.h"

namespace unmoor {

VerifiedBlocks::VerifiedBlocks(const std::vector<LayerReader>& layers)
    : layers_(layers), block_(kBlockSize) {}

Result<std::span<const std::byte>> VerifiedBlocks::Block(uint32_t layer, FileOffset at) {
  const LayerReader& reader = layers_[layer];
  const FileOffset begin(AlignDown(at.value, kBlockSize));
  if (layer_ != &reader || offset_ != begin) {
    layer_ = nullptr;
    UNMOOR_TRY(ReadExactlyAt(reader.pages_fd().get(), block_, begin, reader.pages_path()));
    UNMOOR_TRY(reader.CheckBlock(begin, block_));
    layer_ = &reader;
    offset_ = begin;
  }
  return std::span<const std::byte>(block_);
}

}  // namespace unmoor
