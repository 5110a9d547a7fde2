// Export: a plain CRIU image directory out of ours, for a stock `criu restore`.
//
// CRIU's metadata is copied as it is; pagemap and pages images are written anew, with the pages of
// layers (deltas resolved) merged with those that stayed with CRIU. OUT appears complete or not at
// all. Every block is held against its hash on the way: a damaged image is not exported.
#pragma once

#include <functional>
#include <string>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

struct ExportOptions {
  std::string directory;
  std::string out;                                        // missing or empty
  std::function<void(Bytes done, Bytes total)> progress;  // may be empty
};

struct ExportReport {
  std::string directory;  // absolute
  uint64_t tasks = 0;
  Bytes pages;
};

[[nodiscard]] Result<ExportReport> Export(const ExportOptions& options);

}  // namespace unmoor
