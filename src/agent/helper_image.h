// The helper's code as embedded in this program: a flat binary (helper_blob.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace unmoor {

[[nodiscard]] std::span<const std::byte> HelperImage();
// Where in it the system call instruction of the spawn sequence is.
inline constexpr uint64_t kHelperSpawnOffset = 16;
inline constexpr uint64_t kWatchSpawnOffset = 64;

}  // namespace unmoor
