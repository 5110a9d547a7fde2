// Where an open file lies: on what kind of storage, at which places there, and how much of it the
// page cache holds.
#pragma once

#include <optional>
#include <string>
#include <vector>

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

// Bytes of the storage, half-open.
struct StoredExtent {
  uint64_t begin = 0;
  uint64_t end = 0;
};
// Where the data of a range lies, in the order of the file, as far as it has been written back.
// Nothing: the file system does not tell (FIEMAP).
[[nodiscard]] Result<std::optional<std::vector<StoredExtent>>> ExtentsOf(int fd, FileRange range,
                                                                         const std::string& name);
// Has the file system read all it keeps about where the file lies (FIEMAP_FLAG_CACHE), which else
// it does bit by bit, waiting behind the data that was asked for before. A hint: failure is
// ignored.
void ReadExtents(int fd);

}  // namespace unmoor
