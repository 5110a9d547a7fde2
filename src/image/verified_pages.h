// VerifiedPages: the pages of layers as large pieces of the page cache, each block held against its
// hash before anybody sees it.
//
// For whoever takes much from one place: pages are not copied, they are looked at through a mapping
// that moves along (one for each layer). Where that does not work they are read into a buffer. Of a
// packed layer a frame is decompressed, and kept until kFrames others have been (in all, not for
// each layer: a piece of memory is made of a few). A block that cannot be read whole, or does not
// match, is an error that names the file and the offset; never zeros. See file_window.h for what
// can end the process. One thread. Document: docs/format.md, "Hash". Single blocks, asked for
// anywhere: verified_blocks.h.
#pragma once

#include <bitset>
#include <cstddef>
#include <map>
#include <span>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/file_window.h"
#include "image/layer_source.h"
#include "image/layout.h"

namespace unmoor {

class VerifiedPages {
 public:
  static constexpr uint64_t kMost = uint64_t{256} << 10;  // at once: stays in the cache

  static constexpr size_t kFrames = 4;

  // Their hashes are loaded.
  explicit VerifiedPages(const LayerSources& layers) : layers_(layers) {}
  VerifiedPages(const VerifiedPages&) = delete;
  VerifiedPages& operator=(const VerifiedPages&) = delete;

  // What of `range` lies in the same kMost-aligned piece as its first page, or of a packed layer in
  // the same frame; until the next call.
  [[nodiscard]] Result<std::span<const std::byte>> At(uint32_t layer, FileRange range);

 private:
  struct Window {
    FileWindow file;
    std::bitset<FileWindow::kSize / kBlockSize> verified;
  };
  struct Frame {
    uint32_t layer = 0;
    FileOffset begin;
    std::vector<std::byte> bytes;
    uint64_t used = 0;  // when it was asked for last
  };
  [[nodiscard]] Result<std::span<const std::byte>> InFrame(uint32_t layer, FileRange range);
  // A view of `blocks`, which lie in one window.
  [[nodiscard]] Result<std::span<const std::byte>> Look(const LayerReader& layer, Window& window,
                                                        FileRange blocks);

  const LayerSources& layers_;
  std::map<uint32_t, Window> windows_;
  std::vector<std::byte> buffer_;
  std::vector<Frame> frames_;
  uint64_t turns_ = 0;
  LayerSource::Scratch scratch_;
};

}  // namespace unmoor
