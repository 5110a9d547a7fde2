// userfaultfd: events of an address space, write tracking, placing pages.
//
// The descriptor belongs to the address space it was made in; every call here works from any
// process that holds it. Source: the kernel's Documentation/admin-guide/mm/userfaultfd.rst and
// userfaultfd(2).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

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
  enum class Kind { kFork, kRemap, kRemove, kUnmap, kFault, kOther } kind = Kind::kOther;
  VaddrRange range;  // kRemove, kUnmap; kRemap: where it was; kFault: the page somebody waits for
  Vaddr to;          // kRemap
  Fd child;          // kFork: the child's userfaultfd
};
// Nothing when no event waits. Reading lets the thread that caused the event go on.
[[nodiscard]] Result<std::optional<UffdEvent>> ReadUffdEvent(int uffd);

// How far pages were put into memory registered with kMissing, and what the next one met.
struct UffdPlaced {
  enum class Stop {
    kNone,      // all are in place
    kPresent,   // there is a page already
    kNotThere,  // no memory of this userfaultfd, or not of one VMA with what was asked for
    kChanging,  // an event has not been read, or its thread not gone on: read, and try again
    kOutOfMemory,
    kGone,  // the address space has ended
  } stop = Stop::kNone;
  Bytes bytes;
};
// Puts copies of `pages` at `to`, or zeros into `range`, and wakes those who wait there.
[[nodiscard]] Result<UffdPlaced> UffdCopy(int uffd, Vaddr to, std::span<const std::byte> pages);
[[nodiscard]] Result<UffdPlaced> UffdZero(int uffd, VaddrRange range);
// Whether an event is under way: not read, not queued even, or read by a thread that has not gone
// on. What is said to be kNotThere while none is, is not: nothing can have moved it elsewhere.
[[nodiscard]] bool UffdIsChanging(int uffd);
// Those who wait in `range` look again. Never fails.
void UffdWake(int uffd, VaddrRange range);
// The same for all of the address space.
void UffdWakeAll(int uffd);

}  // namespace unmoor
