// See shared_memory.h.
#include "os/shared_memory.h"

#include <sys/mman.h>

#include <cerrno>

namespace unmoor {

Result<std::span<std::byte>> MapSharedMemory(Bytes size) {
  void* const data = ::mmap(nullptr, size.value, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) return SystemError(errno, "cannot allocate shared memory");
  return std::span(static_cast<std::byte*>(data), size.value);
}

}  // namespace unmoor
