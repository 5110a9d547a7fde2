// XXH3 (64 bits) as fast as this CPU can: libxxhash is built for the oldest x86-64, where it is
// half as fast as with AVX2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace unmoor {

[[nodiscard]] uint64_t HashOf(std::span<const std::byte> bytes);

// Where the CPU has AVX2.
uint64_t HashWithAvx2(const void* bytes, size_t size);

}  // namespace unmoor
