// See storage.h.
#include "os/storage.h"

#include <linux/magic.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>

namespace unmoor {

Result<Storage> StorageOf(int fd, const std::string& name) {
  struct statfs info {};
  if (::fstatfs(fd, &info) != 0) return SystemError(errno, fmt::format("cannot look at {}", name));
  switch (static_cast<uint32_t>(info.f_type)) {
    case TMPFS_MAGIC:
    case RAMFS_MAGIC:
      return Storage::kMemory;
    case NFS_SUPER_MAGIC:
    case SMB_SUPER_MAGIC:
    case 0xff534d42:  // CIFS
    case 0xfe534d42:  // SMB2
    case 0x00c36400:  // Ceph
    case V9FS_MAGIC:
    case AFS_SUPER_MAGIC:
    case 0x65735546:  // FUSE
      return Storage::kNetwork;
    default:
      return Storage::kDisk;
  }
}

Result<Bytes> CachedBytes(int fd, const std::string& name) {
  constexpr long kCachestat = 451;
  struct {
    uint64_t offset, length;  // 0: to its end
  } range{};
  struct {
    uint64_t cached, dirty, under_way, evicted, recently_evicted;  // pages
  } found{};
  if (::syscall(kCachestat, fd, &range, &found, 0) != 0) {
    return SystemError(errno, fmt::format("cannot ask for the cached pages of {}", name));
  }
  return ToBytes(PageCount(found.cached));
}

}  // namespace unmoor
