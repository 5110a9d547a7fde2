// Verify: is an image directory what was written? All damage, not only the first.
//
// The manifest (its checksum), each layer's index (checksums) and pages (a hash a block), the user
// data, that manifest and indexes agree about every VMA, and of CRIU's metadata, which carries no
// checksums, that it can be read and that each pages file is as long as its pagemap says. A damaged
// manifest does not end it: the layer files found are then held against their own indexes.
//
// With `repair_from`, damaged layers are mended from another directory that holds the same layer
// (repair.h). Document: docs/cli.md, "verify".
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/verify.h"

namespace unmoor {

struct VerifyDirectoryOptions {
  std::string directory;
  bool quick = false;  // no pages
  bool deep = false;   // packed layers: also what their frames expand to
  std::optional<std::string> repair_from;
  std::function<void(Bytes done, Bytes total)> progress;  // may be empty
};

struct VerifyDirectoryReport {
  std::string directory;         // absolute
  std::vector<Damage> damages;   // what is left after the repair
  std::vector<Damage> repaired;  // what was found and mended
  size_t layers = 0;
  Bytes checked;  // of pages
  Nanos elapsed;

  [[nodiscard]] bool sound() const { return damages.empty(); }
};

// An error only when nothing can be said: no directory, no image in it.
[[nodiscard]] Result<VerifyDirectoryReport> VerifyDirectory(const VerifyDirectoryOptions& options);

}  // namespace unmoor
