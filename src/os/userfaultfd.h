// userfaultfd: events of an address space, write tracking, placing pages.
//
// The descriptor belongs to the address space it was made in; every call here works from any
// process that holds it. Source: the kernel's Documentation/admin-guide/mm/userfaultfd.rst and
// userfaultfd(2).
#pragma once

#include <cstdint>
#include <optional>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

// Agrees on `features` (UFFD_FEATURE_…). EVENT_FORK needs CAP_SYS_PTRACE in the caller.
[[nodiscard]] Result<> UffdHandshake(int uffd, uint64_t features);
// Features that make tracked file mappings behave: asynchronous write protection and the events
// of fork, mremap, munmap and MADV_DONTNEED.
[[nodiscard]] uint64_t UffdEventFeatures();

enum class UffdMode { kWriteProtect, kMissing };
[[nodiscard]] Result<> UffdRegister(int uffd, VaddrRange range, UffdMode mode);
[[nodiscard]] Result<> UffdUnregister(int uffd, VaddrRange range);

struct UffdEvent {
  enum class Kind { kFork, kRemap, kRemove, kUnmap, kOther } kind = Kind::kOther;
  VaddrRange range;  // kRemove, kUnmap; kRemap: where it was
  Vaddr to;          // kRemap
  Fd child;          // kFork: the child's userfaultfd
};
// Nothing when no event waits. Reading lets the thread that caused the event go on.
[[nodiscard]] Result<std::optional<UffdEvent>> ReadUffdEvent(int uffd);

}  // namespace unmoor
