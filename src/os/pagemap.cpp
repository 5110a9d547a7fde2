// See pagemap.h.
#include "os/pagemap.h"

#include <sys/ioctl.h>
#include <sys/mman.h>

#include <array>
#include <cerrno>

#include "os/kernel_abi.h"

namespace unmoor {

Result<std::vector<VaddrRange>> ScanPages(int pagemap, VaddrRange range, PageQuery query,
                                          bool new_baseline) {
  struct Region {
    uint64_t start, end, categories;
  };
  std::array<Region, 512> regions{};
  std::vector<VaddrRange> found;
  const uint64_t own = query == PageQuery::kPresent ? kernel::kPageIsPfnZero
                                                    : kernel::kPageIsFile | kernel::kPageIsPfnZero;
  for (uint64_t at = range.begin.value; at < range.end.value;) {
    kernel::PmScanArg scan{};
    scan.size = sizeof(scan);
    scan.flags = new_baseline ? kernel::kPmScanWpMatching | kernel::kPmScanCheckWpAsync : 0;
    scan.start = at;
    scan.end = range.end.value;
    scan.vec = reinterpret_cast<uint64_t>(regions.data());  // SAFETY: filled by the kernel
    scan.vec_len = regions.size();
    scan.category_inverted = own;
    scan.category_mask = own | (query == PageQuery::kOwnWritten ? kernel::kPageIsWritten : 0);
    scan.category_anyof_mask = kernel::kPageIsPresent | kernel::kPageIsSwapped;
    scan.return_mask = kernel::kPageIsWpAllowed;
    const long count = ::ioctl(pagemap, kernel::kPagemapScan, &scan);
    if (count < 0) return SystemError(errno, fmt::format("cannot scan pages of {}", range));
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
      const VaddrRange r{Vaddr(regions[i].start), Vaddr(regions[i].end)};
      if (!found.empty() && found.back().end == r.begin) {
        found.back().end = r.end;
      } else {
        found.push_back(r);
      }
    }
    if (scan.walk_end <= at) break;
    at = scan.walk_end;
  }
  return found;
}

Result<std::optional<VmaInfo>> QueryVma(int maps, Vaddr at) {
  kernel::ProcmapQuery query{};
  query.size = sizeof(query);
  query.query_flags = kernel::kProcmapQueryCoveringOrNext;
  query.query_addr = at.value;
  if (::ioctl(maps, kernel::kProcmapQuery, &query) != 0) {
    if (errno == ENOENT) return std::optional<VmaInfo>();
    return SystemError(errno, "cannot query VMAs (kernel 6.11 can)");
  }
  VmaInfo vma;
  vma.range = {Vaddr(query.vma_start), Vaddr(query.vma_end)};
  vma.prot = static_cast<int>(query.vma_flags & 7);
  vma.shared = (query.vma_flags & 8) != 0;
  vma.offset = FileOffset(query.vma_offset);
  vma.inode = query.inode;
  vma.dev_major = query.dev_major;
  vma.dev_minor = query.dev_minor;
  return std::optional<VmaInfo>(std::move(vma));
}

}  // namespace unmoor
