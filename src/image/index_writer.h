// The end of every maker of a layer: its .index file, and both files on their way to the disk.
// Internal to src/image.
#pragma once

#include <string>

#include "base/result.h"
#include "image/layer.h"

namespace unmoor {

struct LayerFiles {
  int pages_fd;
  const std::string& pages_path;
  int index_fd;  // empty
  const std::string& index_path;
};

// Hashes every block of the pages file that holds data and writes header, tables and hashes of the
// finished layer into the index; with `sync` both files are durable then. Sets info.index_checksum
// and info.allocated.
//
// The blocks are read back, mostly from the page cache, rather than hashed as they come: then a
// program may stand still, and a block with one page in it is hashed as a whole.
[[nodiscard]] Result<> FinishLayer(const LayerFiles& files, bool sync, LayerInfo& info);

}  // namespace unmoor
