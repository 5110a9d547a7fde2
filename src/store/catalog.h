// A store: a directory of image directories. What it holds, and what in it nobody needs.
//
// Each image directory is complete in itself, so nothing here follows from one to another but for
// reports: whose parent is whose, and which files are one by hard links. Removing an image takes it
// away by one rename to a name of leftovers (DIR.partial-XXXXXX), then unlinks: killed in between,
// the next gc or dump there finishes the work. Document: docs/cli.md, "log", "rm", "gc".
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/manifest.h"

namespace unmoor {

struct Generation {
  std::string directory;
  std::optional<std::string> problem;  // the manifest cannot be read: all below is empty
  Manifest manifest;
  Bytes pages;          // of the memory, wherever in its layers they are, and with criu
  Bytes written;        // of these, by the dump itself: in a layer of its own, and with criu
  Bytes freeable;       // on disk, if this directory alone were removed
  bool packed = false;  // some layer of it
  std::optional<std::string> parent_directory;  // when it is among those listed
  // Whether `written` is known: the manifest says so, nothing is before it, or the parent is
  // listed.
  [[nodiscard]] bool written_known() const {
    return manifest.written || !manifest.parent_id || parent_directory;
  }
};

// Each of `places` is an image directory, or a directory of such ones. Oldest first.
[[nodiscard]] Result<std::vector<Generation>> ListGenerations(
    const std::vector<std::string>& places);

// Removes an image directory; the bytes this freed on disk. Refused for anything else.
[[nodiscard]] Result<Bytes> RemoveImage(const std::string& directory);

struct Garbage {
  std::string path;
  std::string why;
};

// What is reachable, or in use: gc leaves it alone.
struct Kept {
  std::string path;
  std::string why;
  std::vector<std::string> layers;  // ids, of an image
};

struct GarbageReport {
  std::vector<Garbage> items;
  std::vector<Kept> kept;
  Bytes bytes;  // on disk; a file that something else links to frees nothing
};

// What crashed commands left in `store`, and layer files of its images that no manifest names.
// Removed, unless `dry_run`. Images whose manifest cannot be read are left alone.
[[nodiscard]] Result<GarbageReport> CollectGarbage(const std::string& store, bool dry_run);

}  // namespace unmoor
