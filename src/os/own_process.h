// The calling process's own memory and threads, as the in-process remapper needs them.
//
// Ranges are of this process. Functions that answer with an int give an errno, 0 for success.
// Thread-safe as the system calls are.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

// Non-blocking, close-on-exec, for faults of user mode: needs no privileges.
[[nodiscard]] Result<Fd> CreateOwnUserFaultFd(uint64_t features);
// Gives the pages at `from` away to `to`, which must be registered for missing pages and empty;
// copies them where they cannot be moved.
[[nodiscard]] int MoveOwnPages(int uffd, Vaddr to, Vaddr from, Bytes length);
[[nodiscard]] int WriteProtectOwn(int uffd, VaddrRange range);

// Anonymous, readable, writable, congruent to `congruent_to` modulo 2 MiB, with an inaccessible
// page on either side so that it joins nothing.
struct ReservedMemory {
  VaddrRange whole;  // to unmap
  VaddrRange memory;
};
[[nodiscard]] Result<ReservedMemory> ReserveOwnMemory(Bytes length, uint64_t congruent_to,
                                                      bool no_reserve);
void UnmapOwn(VaddrRange range);
[[nodiscard]] int AdviseOwn(VaddrRange range, int advice);
[[nodiscard]] int ProtectOwn(VaddrRange range, int protection);
// Copies memory that somebody may unmap meanwhile. EFAULT: it was.
[[nodiscard]] int ReadOwnMemory(Vaddr to, VaddrRange from);
// pread without a C library between us and the kernel. ENODATA: the file ends before.
[[nodiscard]] int ReadFileInto(int fd, Vaddr to, Bytes length, FileOffset offset);

// Pages of `range` that are the process's own (not the file's), where asynchronous write protection
// is on; of these, with `written_only`, the ones written since they were last scanned. What is
// reported counts as unwritten from here on. `visit` learns whether a run was written.
[[nodiscard]] Result<> ScanOwnPages(int pagemap, VaddrRange range, bool written_only,
                                    const std::function<void(VaddrRange, bool)>& visit);
// Pages written since they were last protected, whosesoever they are; parts not watched are left
// out.
[[nodiscard]] Result<std::vector<VaddrRange>> ScanWritten(int pagemap, VaddrRange range,
                                                          bool new_baseline);

[[nodiscard]] Result<Fd> CreateEventFd();
void SignalEventFd(int fd);

// A thread that takes no signals but the C library's own and those its own instructions cause.
[[nodiscard]] Result<std::thread> StartQuietThread(const char* name, std::function<void()> body);
// A thread of ours gets a processor only where nobody else wants it (SCHED_IDLE), or as others do.
void RunOnlyWhenIdle(std::thread& thread, bool on);
[[nodiscard]] Nanos ThreadCpuTime();

}  // namespace unmoor
