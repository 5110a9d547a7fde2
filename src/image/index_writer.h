// The .index file on its way to the disk: what every maker of a layer ends with. Internal to
// src/image.
#pragma once

#include <string>

#include "base/result.h"
#include "image/layer.h"

namespace unmoor {

// Hashes every block of the pages file that holds data and writes header, tables and hashes of the
// finished layer into the empty file `index_fd`; sets info.index_checksum. No fsync.
//
// The blocks are read back, mostly from the page cache, rather than hashed as they come: then a
// program may stand still, and a block with one page in it is hashed as a whole.
[[nodiscard]] Result<> WriteLayerIndex(int pages_fd, const std::string& pages_path, int index_fd,
                                       const std::string& index_path, LayerInfo& info);

// What both files of a layer take on the disk.
[[nodiscard]] Result<Bytes> AllocatedBytes(int pages_fd, const std::string& pages_path,
                                           int index_fd, const std::string& index_path);

}  // namespace unmoor
