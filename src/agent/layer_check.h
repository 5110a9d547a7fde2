// LayerCheck: a page image that a program maps, held against the hashes its index has.
//
// For a worker, beside the copying of its helper: both read the same page cache. What the program
// maps is known by descriptor, whatever has become of its name; the index is looked for by that
// name. Where there is none (another tool's image, a deleted directory), or it is damaged, nothing
// can be checked but the file's length, which `unchecked()` explains.
// One thread. A file that cannot be read is damaged, never a crash. Document: docs/format.md,
// "Hash".
#pragma once

#include <cstddef>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/file_window.h"
#include "image/layer_reader.h"
#include "os/procfs.h"

namespace unmoor {

class LayerCheck {
 public:
  struct Damage {
    FileRange block;
    std::string what;  // "PATH …, at offset N"
  };

  LayerCheck() = default;
  // `file`: what `mapping` maps. With `hashes` false only its length is looked at.
  LayerCheck(int file, const VmaInfo& mapping, bool hashes);

  // Why there are no hashes to hold it against; empty: there are.
  [[nodiscard]] const std::string& unchecked() const { return unchecked_; }
  // Whether the extent that a mapping of the file ends in has pages behind that end, which it would
  // show if it grew. False where there is no index to tell.
  [[nodiscard]] bool MoreFollows(FileOffset end) const;
  // Where the file ends too soon for what is mapped up to `end`: what lies behind is the program's
  // SIGBUS to take, and zeros must not take its place.
  [[nodiscard]] std::optional<Damage> Truncated(FileOffset end) const;
  // The blocks with pages in `range` that the index has and the file shows as a hole (`data` is
  // what it shows as data), and that are not pages of zeros but lost ones.
  [[nodiscard]] Result<std::vector<Damage>> Lost(FileRange range,
                                                 const std::vector<FileRange>& data);
  // The blocks that touch `range` and are not what they were when they were hashed. Reads them all,
  // from `checked` on, which becomes the end of the last one.
  [[nodiscard]] Result<std::vector<Damage>> Look(FileRange range, FileOffset& checked);

 private:
  [[nodiscard]] Result<LayerReader> OpenIndex(int file) const;
  [[nodiscard]] std::string EndsAt(uint64_t size) const;
  [[nodiscard]] std::vector<FileRange> Missing(FileRange range,
                                               const std::vector<FileRange>& data) const;

  int file_ = -1;
  std::string path_;
  std::string unchecked_ = "not looked for";
  std::optional<LayerReader> layer_;
  FileWindow window_;
  std::vector<std::byte> buffer_;
  std::set<FileRange> zeros_;  // found missing, and right
};

}  // namespace unmoor
