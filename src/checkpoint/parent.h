// Parent: the checkpoint a new one is made after, and what of it the new one can go on using.
//
// Each VMA of the program may stand on the layers of a parent's VMA at the same addresses of the
// same task: then only pages that differ from them are written. Nothing is believed about what the
// program did since: the caller compares every page. So a parent of another program costs bytes,
// never correctness. Whatever would make the restore dear (many deltas) or wrong (a VMA that could
// grow into old bytes) is refused here, and the VMA is written in full.
//
// Trusts nothing it reads (LayerReader). Immutable after Open. Document: docs/format.md, "Deltas".
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/delta_writer.h"
#include "image/layer_reader.h"
#include "image/manifest.h"
#include "image/overlay.h"
#include "os/procfs.h"

namespace unmoor {

// Whether so much differs from the base that the VMA is better written in full: a delta's pages are
// copied at restore instead of mapped. Told from a sample; right or wrong, it decides about cost
// only. `writer` knows the base's layers.
[[nodiscard]] bool IsMostlyChanged(const DeltaWriter& writer, const LayerBase& base,
                                   const PageSource& now);

class Parent {
 public:
  // An error when it is no sound checkpoint of a process tree.
  [[nodiscard]] static Result<Parent> Open(const std::string& directory);
  // What was written ahead of a dump (write_ahead.h) into `directory`, over `below`, if any: the
  // VMAs of `tasks` have their pages in `layer`.
  [[nodiscard]] static Result<Parent> Over(std::optional<Parent> below,
                                           const std::string& directory, LayerReader layer,
                                           const std::vector<ManifestTask>& tasks);

  // Nothing of it but what was written ahead.
  [[nodiscard]] bool is_no_checkpoint() const { return manifest_.checkpoint_id.empty(); }

  [[nodiscard]] const std::string& directory() const { return directory_; }  // absolute
  [[nodiscard]] const Manifest& manifest() const { return manifest_; }
  [[nodiscard]] const std::vector<LayerReader>& layers() const { return layers_; }

  // Nothing: the VMA is to be written in full. With `still_mapped`, how much of it is anonymous
  // tells nothing about what it holds.
  [[nodiscard]] std::optional<LayerBase> Find(uint32_t vpid, const VmaInfo& vma,
                                              bool still_mapped = false) const;

  // The layer that the VMA, of a running program, is a mapping of: by device and inode.
  [[nodiscard]] std::optional<uint32_t> LayerOf(const VmaInfo& vma) const;
  // The task's VMAs whose pages are in layers, ascending.
  [[nodiscard]] std::vector<VaddrRange> MappedRanges(uint32_t vpid) const;

 private:
  Parent() = default;
  [[nodiscard]] Result<> Add(LayerReader layer);
  void Resolve();

  std::string directory_;
  Manifest manifest_;
  struct FileId {
    uint64_t device_major, device_minor, inode;
    bool operator==(const FileId&) const = default;
  };

  std::vector<LayerReader> layers_;
  std::vector<FileId> files_;       // of layers_
  std::optional<Overlay> overlay_;  // of layers_, whose elements stay where they are
};

}  // namespace unmoor
