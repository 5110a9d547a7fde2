// See block_hash.h. Compiled for AVX2: nothing in here may be shared with other files, so it uses
// the hash alone, all of it static.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "image/block_hash.h"

namespace unmoor {

uint64_t HashWithAvx2(const void* bytes, size_t size) {
  return XXH3_64bits(bytes, size);
}

}  // namespace unmoor
