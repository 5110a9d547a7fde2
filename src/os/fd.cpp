// See fd.h.
#include "os/fd.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "os/file_hook.h"

namespace unmoor {

void Fd::Reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this != &other) {
    if (data_ != nullptr) ::munmap(data_, size_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

Result<Mapping> Mapping::OfFile(int fd, uint64_t offset, size_t size) {
  if (size == 0) return Mapping();
  if (const int failure = BeforeFileCall("mmap", fd, {}); failure != 0) {
    return SystemError(failure, "cannot map file");
  }
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (data == MAP_FAILED) return SystemError(errno, "cannot map file");
  return Mapping(static_cast<std::byte*>(data), size);
}

Result<Mapping> Mapping::Anonymous(size_t size) {
  if (const int failure = BeforeFileCall("mmap", -1, {}); failure != 0) {
    return SystemError(failure, "cannot allocate memory");
  }
  void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return SystemError(errno, "cannot allocate memory");
  return Mapping(static_cast<std::byte*>(data), size);
}

}  // namespace unmoor
