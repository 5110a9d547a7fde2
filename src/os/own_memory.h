// The calling process's own memory: mapping, protecting, reading it without a risk of a signal.
//
// Errors name addresses and carry the errno. Thread-safe as the system calls are.
#pragma once

#include <cstddef>
#include <span>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

enum class MapAt {
  kFree,     // EEXIST when anything is there (MAP_FIXED_NOREPLACE)
  kReplace,  // over the caller's own mapping
};
// A private mapping of `fd` at `offset`, exactly at `range`.
[[nodiscard]] Result<> MapFilePrivately(int fd, FileOffset offset, VaddrRange range, int prot,
                                        MapAt at);
// Address space nobody else gets: `size` bytes that begin at `remainder` modulo 2 MiB, without
// access and without memory.
[[nodiscard]] Result<VaddrRange> ReserveAddresses(Bytes size, uint64_t remainder);
[[nodiscard]] Result<> ProtectMemory(VaddrRange range, int prot);
[[nodiscard]] Result<> UnmapMemory(VaddrRange range);
// Has all of a mapping's pages there (MADV_POPULATE_READ, Linux 5.14). An error where one cannot be
// had: then reading it would be a signal.
[[nodiscard]] Result<> PopulateForReading(VaddrRange range);

// Copies own memory; EFAULT, no signal, where it cannot be read.
[[nodiscard]] Result<> ReadOwnMemory(Vaddr at, std::span<std::byte> data);

// vm.max_map_count; its default where it cannot be read.
[[nodiscard]] size_t MaxMapCount();

// All signals are blocked in the calling thread for the life of this, so that a thread started
// meanwhile takes none of the program's signals.
class SignalsBlocked {
 public:
  SignalsBlocked();
  ~SignalsBlocked();
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  alignas(16) std::byte old_[128];  // a sigset_t
};

}  // namespace unmoor
