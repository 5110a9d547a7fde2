// Working set: DIR/working_set, which pages of the layers a program touched first, in that order.
//
// Recorded while a restored program runs (restore/record.h), read ahead by the next restore
// (restore/prefetch.h), put next to one another on the disk by reorder (store/reorder.h). Only a
// hint: it changes when pages are read, never which. So it is the one file of an image directory
// that may appear, be replaced or go while the rest stays; written beside its name and renamed. Its
// ranges name layers by id, so it stays right as long as these layers are there, whatever else
// becomes of the directory. Plain values, no threads. Document: docs/format.md, "Working set".
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/manifest.h"

namespace unmoor {

struct WorkingSetRange {
  uint32_t layer = 0;  // index into WorkingSet::layers
  FileRange range;     // of its pages file
  bool operator==(const WorkingSetRange&) const = default;
};

struct WorkingSet {
  std::vector<std::string> layers;      // ids
  std::vector<WorkingSetRange> ranges;  // in the order in which they are to be read

  [[nodiscard]] Bytes size() const;
  bool operator==(const WorkingSet&) const = default;
};

// What is to be read, in order: ranges that follow one another at a small distance are one, since
// reading what lies between is cheaper than another request.
[[nodiscard]] std::vector<WorkingSetRange> MergeForReading(
    const std::vector<WorkingSetRange>& ranges);

inline constexpr uint64_t kMaxWorkingSetRanges = uint64_t{1} << 20;

// The bytes of the file. Decode() checks every count and range; `name` is for messages.
[[nodiscard]] std::vector<std::byte> EncodeWorkingSet(const WorkingSet& set);
[[nodiscard]] Result<WorkingSet> DecodeWorkingSet(std::span<const std::byte> bytes,
                                                  const std::string& name);

// Nothing when the image has none.
[[nodiscard]] Result<std::optional<WorkingSet>> ReadWorkingSet(const std::string& dir);
// Of the checkpoint with that id, which must be the one in `dir` still. Replaces one that is there.
[[nodiscard]] Result<> WriteWorkingSet(const std::string& dir, const std::string& checkpoint_id,
                                       const WorkingSet& set);
// Whether all of it lies in the layers of the manifest.
[[nodiscard]] Result<> CheckWorkingSet(const WorkingSet& set, const Manifest& manifest,
                                       const std::string& name);

}  // namespace unmoor
