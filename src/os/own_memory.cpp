// See own_memory.h.
#include "os/own_memory.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include <cerrno>
#include <charconv>
#include <cstring>

#include "os/file.h"
#include "os/process_control.h"
#include "os/remote_memory.h"

namespace unmoor {
namespace {

// SAFETY: an address given to the kernel, never dereferenced here.
void* Pointer(Vaddr at) {
  return reinterpret_cast<void*>(at.value);
}

}  // namespace

Result<> MapFilePrivately(int fd, FileOffset offset, VaddrRange range, int prot, MapAt at) {
  const int fixed = at == MapAt::kFree ? MAP_FIXED_NOREPLACE : MAP_FIXED;
  // SAFETY: MAP_FIXED only over a mapping that the caller owns.
  void* const got = ::mmap(Pointer(range.begin), range.size().value, prot, MAP_PRIVATE | fixed, fd,
                           static_cast<off_t>(offset.value));
  if (got == MAP_FAILED) return SystemError(errno, fmt::format("cannot map a file at {}", range));
  if (got == Pointer(range.begin)) return {};
  // A kernel before 4.17 takes MAP_FIXED_NOREPLACE for a hint.
  (void)::munmap(got, range.size().value);
  return SystemError(EEXIST, fmt::format("cannot map a file at {}", range));
}

Result<VaddrRange> ReserveAddresses(Bytes size, uint64_t remainder) {
  const size_t wanted = size.value + kHugePageSize;
  void* const got =
      ::mmap(nullptr, wanted, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) {
    return SystemError(errno, fmt::format("cannot reserve {} of addresses", HumanBytes(size)));
  }
  const auto all = reinterpret_cast<uint64_t>(got);  // SAFETY: arithmetic only
  uint64_t begin = AlignDown(all, kHugePageSize) + remainder % kHugePageSize;
  if (begin < all) begin += kHugePageSize;
  const VaddrRange range{Vaddr(begin), Vaddr(begin) + size};
  if (begin > all) (void)::munmap(got, begin - all);
  if (const uint64_t rest = all + wanted - range.end.value; rest > 0) {
    (void)::munmap(Pointer(range.end), rest);
  }
  return range;
}

Result<> ProtectMemory(VaddrRange range, int prot) {
  if (::mprotect(Pointer(range.begin), range.size().value, prot) == 0) return {};
  return SystemError(errno, fmt::format("cannot protect {}", range));
}

Result<> PopulateForReading(VaddrRange range) {
  constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ
  if (::madvise(Pointer(range.begin), range.size().value, kPopulateRead) == 0) return {};
  return SystemError(errno, fmt::format("cannot read what is mapped at {}", range));
}

Result<> UnmapMemory(VaddrRange range) {
  if (::munmap(Pointer(range.begin), range.size().value) == 0) return {};
  return SystemError(errno, fmt::format("cannot unmap {}", range));
}

Result<> ReadOwnMemory(Vaddr at, std::span<std::byte> data) {
  auto result = ReadMemory(OwnPid(), at, data);
  if (result || (result.error().errnum() != EPERM && result.error().errnum() != ENOSYS)) {
    return result;
  }
  // Sandboxes that forbid process_vm_readv.
  const std::string path = "/proc/self/mem";
  UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_RDONLY));
  return ReadExactlyAt(fd.get(), data, FileOffset(at.value), path);
}

size_t MaxMapCount() {
  constexpr size_t kDefault = 65530;
  const auto text = ReadFile("/proc/sys/vm/max_map_count");
  size_t count = 0;
  if (!text ||
      std::from_chars(text->data(), text->data() + text->size(), count).ec != std::errc()) {
    return kDefault;
  }
  return count;
}

SignalsBlocked::SignalsBlocked() {
  static_assert(sizeof(sigset_t) <= sizeof(old_));
  sigset_t all;
  sigset_t old;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &old);
  std::memcpy(old_, &old, sizeof old);
}

SignalsBlocked::~SignalsBlocked() {
  sigset_t old;
  std::memcpy(&old, old_, sizeof old);
  ::pthread_sigmask(SIG_SETMASK, &old, nullptr);
}

}  // namespace unmoor
