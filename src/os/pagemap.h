// Which pages of a process are what, and which VMA is where: PAGEMAP_SCAN and PROCMAP_QUERY.
//
// Source: the kernel's Documentation/admin-guide/mm/pagemap.rst; PROCMAP_QUERY in
// Documentation/filesystems/proc.rst.
#pragma once

#include <optional>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "os/procfs.h"

namespace unmoor {

enum class PageQuery {
  // Pages of the process's own: copied on write or anonymous, present or swapped. No zero pages.
  kOwn,
  // Of these, the ones written since the last scan with `new_baseline`.
  kOwnWritten,
  // Everything its page tables have, of files too, but zero pages.
  kPresent,
};

// `pagemap` is an open /proc/PID/pagemap. With `new_baseline` what is reported counts as unwritten
// from here on (the range must be registered with a WP_ASYNC userfaultfd; EPERM otherwise).
[[nodiscard]] Result<std::vector<VaddrRange>> ScanPages(int pagemap, VaddrRange range,
                                                        PageQuery query, bool new_baseline);

// The VMA that holds `at`, or the next one above it; nothing when there is none. `maps` is an open
// /proc/PID/maps. Names and flags beyond protection and sharing are left empty.
[[nodiscard]] Result<std::optional<VmaInfo>> QueryVma(int maps, Vaddr at);

}  // namespace unmoor
