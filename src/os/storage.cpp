// See storage.h.
#include "os/storage.h"

#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>

namespace unmoor {

Result<Storage> StorageOf(int fd, const std::string& name) {
  struct statfs info{};
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

Result<std::optional<std::vector<StoredExtent>>> ExtentsOf(int fd, FileRange range,
                                                           const std::string& name) {
  constexpr uint32_t kAtOnce = 128;
  struct Request {
    alignas(fiemap) std::byte bytes[sizeof(fiemap) + kAtOnce * sizeof(fiemap_extent)];
  };
  std::vector<StoredExtent> found;
  for (FileOffset at = range.begin; at < range.end;) {
    Request request{};
    // SAFETY: the kernel's header, followed by room for kAtOnce extents.
    auto* const map = reinterpret_cast<fiemap*>(request.bytes);
    map->fm_start = at.value;
    map->fm_length = (range.end - at).value;
    map->fm_extent_count = kAtOnce;
    if (::ioctl(fd, FS_IOC_FIEMAP, map) != 0) {
      if (errno == EOPNOTSUPP || errno == ENOTTY) return std::nullopt;
      return SystemError(errno, fmt::format("cannot ask where {} lies on the disk", name));
    }
    if (map->fm_mapped_extents == 0) break;
    for (uint32_t i = 0; i < map->fm_mapped_extents; ++i) {
      const fiemap_extent& extent = map->fm_extents[i];
      const uint64_t begin = std::max<uint64_t>(extent.fe_logical, at.value);
      const uint64_t end =
          std::min<uint64_t>(extent.fe_logical + extent.fe_length, range.end.value);
      const uint64_t place = extent.fe_physical + (begin - extent.fe_logical);
      found.push_back({place, place + (end - begin)});
      at = FileOffset(end);
      if ((extent.fe_flags & FIEMAP_EXTENT_LAST) != 0) return found;
    }
  }
  return found;
}

void ReadExtents(int fd) {
  fiemap request{};
  request.fm_length = FIEMAP_MAX_OFFSET;
  request.fm_flags = FIEMAP_FLAG_CACHE;
  (void)::ioctl(fd, FS_IOC_FIEMAP, &request);
}

}  // namespace unmoor
