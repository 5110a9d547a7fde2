// Reorder: the pages of a recorded working set next to one another on the disk.
//
// Where a page is in its layer's file cannot change: mappings, indexes and deltas say so. Where the
// file system keeps it can: the file is written anew, the working set's pages getting their place
// on the disk first, in the order in which they will be read, then the rest; sparse as before. So
// the first reads of a cold restore follow one another on the disk. Each block is held against its
// hash on the way.
//
// The new file is written beside the old one and renamed over it, layer by layer (they do not
// depend on one another, and both forms are the same layer). Killed at any moment the old or the
// new is there. Programs that map the old file, and directories that link it, keep it. A layer
// whose pages would lie no better than before stays as it is. Document: docs/cli.md, "reorder"; why
// it is worth it: docs/decisions.md, 74.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

// In which order the pages of a file are to get their place.
struct PageOrder {
  std::vector<FileRange>
      first;  // what is wanted and holds data, in the order wanted, each byte once
  std::vector<FileRange> rest;  // all other data, ascending
  bool operator==(const PageOrder&) const = default;
};
// `data`: ascending, apart from one another.
[[nodiscard]] PageOrder OrderPages(const std::vector<FileRange>& wanted,
                                   const std::vector<FileRange>& data);

struct ReorderOptions {
  std::string directory;
  bool dry_run = false;                                   // looks only
  std::function<void(Bytes done, Bytes total)> progress;  // may be empty
};

struct ReorderReport {
  std::string directory;      // absolute
  Bytes working_set;          // as recorded
  Bytes placed;               // with what lies between its pages and is read with them
  size_t layers = 0;          // that hold some of it
  size_t written_layers = 0;  // those that were written anew, or with dry_run would be
  Bytes written;              // bytes of these files
  // In how many pieces the working set lies on the disk, read in its order. Nothing: the file
  // system does not tell; with dry_run there is no `after`.
  std::optional<size_t> extents_before;
  std::optional<size_t> extents_after;
};

// User errors: no working set, or a damaged one; a packed image; a damaged layer.
[[nodiscard]] Result<ReorderReport> Reorder(const ReorderOptions& options);

}  // namespace unmoor
