// Other processes' memory, read and written from outside. Errors carry ESRCH when the process
// ended.
#pragma once

#include <cstddef>
#include <span>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

[[nodiscard]] Result<> ReadMemory(Pid pid, Vaddr at, std::span<std::byte> data);
[[nodiscard]] Result<> WriteMemory(Pid pid, Vaddr at, std::span<const std::byte> data);
// Through /proc/PID/mem: also where the VMA is not writable (the page becomes a private copy).
[[nodiscard]] Result<> ForceWriteMemory(Pid pid, Vaddr at, std::span<const std::byte> data);

}  // namespace unmoor
