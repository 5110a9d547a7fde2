// Memory that a process and its children have in common.
#pragma once

#include <cstddef>
#include <span>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

// `size` bytes of zeros, until the process ends; memory is used only for what is written.
[[nodiscard]] Result<std::span<std::byte>> MapSharedMemory(Bytes size);

}  // namespace unmoor
