// Whether memory holds nothing but zeros: pages that need not be stored, blocks without a hash.
#pragma once

#include <cstddef>
#include <span>

namespace unmoor {

// At about the speed of memory.
[[nodiscard]] bool IsZero(std::span<const std::byte> bytes);

}  // namespace unmoor
