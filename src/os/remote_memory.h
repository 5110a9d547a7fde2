// Other processes' memory, read and written from outside. Errors carry ESRCH when the process
// ended.
#pragma once

#include <cstddef>
#include <span>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

[[nodiscard]] Result<> ReadMemory(Pid pid, Vaddr at, std::span<std::byte> data);
[[nodiscard]] Result<> WriteMemory(Pid pid, Vaddr at, std::span<const std::byte> data);
// Through /proc/PID/mem: also where the VMA is not writable (the page becomes a private copy).
[[nodiscard]] Result<> ForceWriteMemory(Pid pid, Vaddr at, std::span<const std::byte> data);

// One process's memory while nobody runs in it, to be filled from outside by several threads.
class MemoryOfStopped {
 public:
  [[nodiscard]] static Result<MemoryOfStopped> Open(Pid pid);

  [[nodiscard]] Pid pid() const { return pid_; }
  // As ForceWriteMemory where the VMA is not `writable`, else as WriteMemory.
  [[nodiscard]] Result<> Write(Vaddr at, std::span<const std::byte> data, bool writable) const;
  // Makes huge pages of whatever is in the 2 MiB blocks that begin at `blocks` (ascending), of
  // which something may be missing: that reads zero. Anonymous, writable memory. Where it does not
  // work (no huge page free, a kernel before 6.1) small pages stay; no error.
  void MakeHuge(std::span<const Vaddr> blocks) const;

 private:
  MemoryOfStopped(Pid pid, Fd pidfd, Fd memory)
      : pid_(pid), pidfd_(std::move(pidfd)), memory_(std::move(memory)) {}
  Pid pid_;
  Fd pidfd_;
  Fd memory_;
};

}  // namespace unmoor
