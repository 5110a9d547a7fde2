// Verification of a layer: every checksum and hash it has, all damage found and told, none trusted.
//
// Unlike LayerReader, which refuses a file at its first fault, this goes on behind one: the index
// and the pages are checked as far as each can be. Blocks are read by several threads with large
// reads of data ranges only, so the time follows the data and not the file's size. Reading is all
// that is done here; repair is in src/store. Document: docs/format.md, "Layer".
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/index_format.h"
#include "image/layer.h"
#include "image/manifest.h"

namespace unmoor {

// What of the program's memory a damage concerns.
struct DamagePlace {
  uint32_t task_vpid = 0;
  std::string task;  // comm
  VaddrRange vma;
  std::string vma_name;
  VaddrRange addresses;
};

struct Damage {
  std::string file;
  std::optional<FileRange> bytes;  // where in it
  std::string what;                // one line; names the file
  std::vector<DamagePlace> places;
  std::optional<FileRange> pages = {};  // of the page image, when `file` is another
};

// A whole index, each of its checks passed.
struct LayerIndex {
  index_format::Header header;
  index_format::Tables tables;
  std::vector<uint64_t> hashes;  // of blocks[i]
  std::vector<uint64_t> blocks;  // file offset / 64 KiB, ascending
};

// `expected`: the manifest's entry, which the index must be the one of.
[[nodiscard]] Result<LayerIndex> ReadLayerIndex(const std::string& path,
                                                const ManifestLayer* expected);

// Bytes of pages checked so far; called by one thread at a time.
using VerifyProgress = std::function<void(Bytes done)>;

struct LayerVerdict {
  std::optional<LayerIndex> index;       // when it is whole
  std::vector<Damage> damages;           // without places
  std::vector<uint64_t> damaged_blocks;  // those with a hash that they don't match, ascending
  bool pages_unsound = false;            // wrong size, missing, or data where none should be
  Bytes checked;                         // data read and hashed
};

struct VerifyOptions {
  bool pages = true;     // false: all but the pages
  unsigned threads = 0;  // 0: as many as there are processors, at most 8
  VerifyProgress progress;
};

// Layer `id` of `dir`. `expected` may be null (a damaged manifest): the index is then believed.
[[nodiscard]] LayerVerdict VerifyLayer(const std::string& dir, const std::string& id,
                                       const ManifestLayer* expected, const VerifyOptions& options);

// What `bytes` of layer number `layer` are to the program; VMAs of `manifest`, or extents alone.
[[nodiscard]] std::vector<DamagePlace> PlacesOf(FileRange bytes, const LayerIndex& index,
                                                uint32_t layer, const Manifest* manifest);

}  // namespace unmoor
