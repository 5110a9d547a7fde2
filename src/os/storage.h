// Where an open file lies: on what kind of storage, and how much of it the page cache holds.
#pragma once

#include <string>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

enum class Storage {
  kDisk,     // or what cannot be told from one
  kMemory,   // tmpfs, ramfs
  kNetwork,  // another machine's, or a process's (FUSE)
};
[[nodiscard]] Result<Storage> StorageOf(int fd, const std::string& name);
// Nothing of it need be read for an answer (cachestat(2), Linux 6.5).
[[nodiscard]] Result<Bytes> CachedBytes(int fd, const std::string& name);

}  // namespace unmoor
