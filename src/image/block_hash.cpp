// See block_hash.h.
#include "image/block_hash.h"

#include <xxhash.h>

namespace unmoor {

uint64_t HashOf(std::span<const std::byte> bytes) {
  static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
  if (has_avx2) return HashWithAvx2(bytes.data(), bytes.size());
  return XXH3_64bits(bytes.data(), bytes.size());
}

}  // namespace unmoor
