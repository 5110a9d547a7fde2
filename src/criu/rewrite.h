// Metadata for a direct-mapped restore: anonymous VMAs become private mappings of page images.
//
// The view is a directory of symbolic links to CRIU's own files, except mm-<vpid>.img of the mapped
// tasks and files.img, which are new; tasks with pages to load get a pagemap and a pages image of
// their own, CRIU's pages and these merged. CRIU's own files are never touched. Each (task, layer)
// gets a file id of its own: with a shared one CRIU takes the mapping of a child for its parent's
// and the child silently gets the parent's memory. CRIU learns the files themselves by
//   --inherit-fd fd[N]:unmoor-layer-<layer>
// Failure leaves a partly filled view, which the caller removes. Thread-safe.
//
// And the way back, for a program that was dumped while it was mapped: its metadata becomes what
// it would be had the memory been anonymous already.
//
// For `criu restore --lazy-pages` only the pagemaps are new: criu loads all but what is marked.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor::criu {

// `range` of a task is to map its layer from `offset` on. A range is one or more whole VMAs.
struct DirectMapping {
  VaddrRange range;
  uint32_t layer = 0;  // index the caller chose; names the inherited descriptor
  FileOffset offset;
};

struct TaskMapping {
  uint32_t vpid = 0;
  std::vector<DirectMapping> mappings;    // ascending, disjoint
  std::vector<DirectMapping> loads = {};  // ascending, disjoint: pages CRIU is to load over them
};

// A layer's pages, open for reading.
struct LayerFile {
  int fd = -1;
  std::string path;
};

// Name of a layer's file as CRIU's --inherit-fd wants it: "unmoor-layer-3".
[[nodiscard]] std::string LayerKey(uint32_t layer);
// The argument: "fd[7]:unmoor-layer-3".
[[nodiscard]] std::string InheritFdArgument(int fd, uint32_t layer);

// `criu_directory` is absolute; `view_directory` exists, and what it holds already (gate.h) stays.
// `layers[i]` is layer i; needed where a task has loads.
[[nodiscard]] Result<> RewriteForDirectMap(const std::string& criu_directory,
                                           const std::string& view_directory,
                                           std::span<const TaskMapping> tasks,
                                           std::span<const LayerFile> layers = {});

struct MappedTask {
  uint32_t vpid = 0;
  std::vector<VaddrRange> ranges;  // ascending, disjoint; each one or more whole VMAs
};

// In place, in CRIU metadata that nobody else uses yet. File mappings inside of the ranges become
// anonymous, and files only they refer to are forgotten.
[[nodiscard]] Result<> MakeAnonymousAgain(const std::string& criu_directory,
                                          std::span<const MappedTask> tasks);

// The view of a restore whose mapped ranges criu leaves empty, for a lazy-pages server to fill. Its
// own marks (a dump sets them on all that could be lazy) are taken away everywhere else.
[[nodiscard]] Result<> RewriteForLazyPages(const std::string& criu_directory,
                                           const std::string& view_directory,
                                           std::span<const TaskMapping> tasks);

}  // namespace unmoor::criu
