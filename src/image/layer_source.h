// LayerSource: the pages of one layer for whoever brings them himself, plain or packed.
//
// Read piece by piece, each held against its hashes before anybody sees it: of a plain layer a
// block (64 KiB), of a packed one the 2 MiB that a frame holds, since it is decompressed whole. A
// piece that cannot be read whole, or does not match, is an error that names the file and the
// offset; never zeros. Nothing is written anywhere: a packed layer stays packed.
//
// Immutable but for LoadHashes; const functions may be called from any thread, each with a scratch
// of its own. Document: docs/format.md, "Hash", "Packed layer".
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/compression.h"
#include "image/layer.h"
#include "image/layer_reader.h"
#include "image/manifest.h"
#include "os/fd.h"

namespace unmoor {

class LayerSource {
 public:
  // Working memory of one thread, for any layers: up to two frames.
  struct Scratch {
    Decompressor decompressor;
    std::vector<std::byte> stored;
    std::vector<std::byte> content;
  };

  // The layer `entry` of the checkpoint in `dir`, in the form it has; checks also that it is the
  // one the manifest means.
  [[nodiscard]] static Result<std::unique_ptr<LayerSource>> Open(const std::string& dir,
                                                                 const ManifestLayer& entry);
  // One opened already.
  [[nodiscard]] static std::unique_ptr<LayerSource> Plain(LayerReader reader);

  LayerSource() = default;
  LayerSource(const LayerSource&) = delete;
  LayerSource& operator=(const LayerSource&) = delete;
  virtual ~LayerSource() = default;

  [[nodiscard]] virtual const LayerInfo& info() const = 0;
  [[nodiscard]] virtual const std::string& path() const = 0;  // of the file that holds the pages
  [[nodiscard]] virtual const Fd& file() const = 0;           // all that reading needs
  [[nodiscard]] virtual uint64_t piece_size() const = 0;      // kBlockSize or more, a power of two
  // Needed before ReadPiece; idempotent.
  [[nodiscard]] virtual Result<> LoadHashes() = 0;
  // The piece that begins at `begin`, a multiple of its size; zeros where the layer holds nothing.
  [[nodiscard]] virtual Result<> ReadPiece(FileOffset begin, std::span<std::byte> into,
                                           Scratch& scratch) const = 0;
  // Of a plain layer, whose pages can be looked at where they are.
  [[nodiscard]] virtual const LayerReader* plain() const { return nullptr; }
};

using LayerSources = std::vector<std::unique_ptr<LayerSource>>;

}  // namespace unmoor
