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
    if (!reader.BlockMatches(begin, block_)) {
      return UserError("{}: the {} bytes at offset {} do not match their hash; the layer is damaged",
                       reader.pages_path(), kBlockSize, begin.value);
    }
    layer_ = &reader;
    offset_ = begin;
  }
  return std::span<const std::byte>(block_);
}

}  // namespace unmoor
