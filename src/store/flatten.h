// Flatten: the same checkpoint with one layer, in which each page is what the chain showed.
//
// A chain grows with each dump: more files, pages that deltas hide, pages CRIU has to copy at
// restore. Flatten writes what the VMAs show into one new layer, made to be mapped whole; pages
// that forked tasks share stay shared. Everything else of the checkpoint (its id, its parent's,
// when it was made, CRIU's files) stays what it was.
//
// Never in place: written beside and exchanged (Publisher), so a crash leaves the old or the new
// directory. Programs that map the old layers, and directories that link them, keep them. Every
// page is held against its hash on the way: damage is not made respectable by a new hash.
#pragma once

#include <functional>
#include <string>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

struct FlattenOptions {
  std::string directory;
  std::string out;                                        // empty: `directory` itself is replaced
  std::function<void(Bytes done, Bytes total)> progress;  // may be empty
};

struct FlattenReport {
  std::string directory;  // absolute
  bool was_flat = false;  // nothing was written
  size_t layers_before = 0;
  Bytes layer_bytes_before;  // pages in them
  Bytes written;             // pages in the new layer
};

[[nodiscard]] Result<FlattenReport> Flatten(const FlattenOptions& options);

// How far a directory is from being flat, from its manifest and indexes alone.
struct ChainLength {
  size_t layers = 0;
  Bytes pages;  // in all its layers
  Bytes shown;  // of these, by any VMA
  [[nodiscard]] Bytes dead() const { return pages - shown; }
  [[nodiscard]] bool flat() const { return layers <= 1 && dead() == Bytes(0); }
};
[[nodiscard]] Result<ChainLength> MeasureChain(const std::string& directory);

// When a dump should be followed by a flatten: more layers than `most_layers`, or more dead bytes
// than live ones (and enough of them to matter).
[[nodiscard]] bool IsWorthFlattening(const ChainLength& chain, size_t most_layers);

}  // namespace unmoor
