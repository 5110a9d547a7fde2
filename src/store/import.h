// Import: an image directory out of what stock `criu dump` wrote.
//
// Pages of private anonymous memory go to a layer, as a dump of ours would have put them; all else
// (shared memory, special VMAs, small remnants) stays with CRIU, in its own format. A chain of
// CRIU's own incremental dumps (the link `parent`, pages marked as being in the parent) is
// resolved, so OUT needs none of them; holes that `criu dedup` made in parents are those that
// nothing refers to. CRIU keeps no checksums, so damage to pages cannot be found here.
//
// CRIU's pages files cannot be mapped where they are: runs lie one after the other, so a VMA would
// be as many mappings as it has runs, at unfitting offsets, and would grow into the next run's
// bytes.
#pragma once

#include <functional>
#include <string>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

struct ImportOptions {
  std::string directory;
  std::string out;
  std::string tool_version;
  std::function<void(Bytes done, Bytes total)> progress;  // may be empty
};

struct ImportReport {
  std::string directory;  // absolute
  size_t tasks = 0;
  size_t generations = 0;  // directories of CRIU's chain
  Bytes layer_bytes;
  Bytes criu_bytes;
};

[[nodiscard]] Result<ImportReport> Import(const ImportOptions& options);

// Whether `directory` is what `criu dump` wrote, and no image of ours.
[[nodiscard]] bool IsStockCriuDirectory(const std::string& directory);

// `directory` imported into DIRECTORY.unmoor-import beside it, unless it is there already: made
// from files of the same names, sizes and times. options.out is not looked at.
struct ImportedBeside {
  std::string directory;
  bool fresh = false;  // imported now
};
[[nodiscard]] Result<ImportedBeside> ImportBeside(const ImportOptions& options);

}  // namespace unmoor
