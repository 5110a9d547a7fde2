// See remote_memory.h.
#include "os/remote_memory.h"

#include <fcntl.h>
#include <sys/uio.h>

#include <cerrno>

#include "os/file.h"

namespace unmoor {
namespace {

Result<> Check(ssize_t done, size_t wanted, const char* verb, Pid pid, Vaddr at) {
  if (done == static_cast<ssize_t>(wanted)) return {};
  return SystemError(done < 0 ? errno : EFAULT,
                     fmt::format("cannot {} memory of process {} at {}", verb, pid.value, at));
}

}  // namespace

Result<> ReadMemory(Pid pid, Vaddr at, std::span<std::byte> data) {
  // SAFETY: an address of the other process, only used by the kernel.
  const iovec remote{reinterpret_cast<void*>(at.value), data.size()};
  const iovec local{data.data(), data.size()};
  return Check(::process_vm_readv(pid.value, &local, 1, &remote, 1, 0), data.size(), "read", pid,
               at);
}

Result<> WriteMemory(Pid pid, Vaddr at, std::span<const std::byte> data) {
  // SAFETY: as above; process_vm_writev only reads from `local`.
  const iovec remote{reinterpret_cast<void*>(at.value), data.size()};
  const iovec local{const_cast<std::byte*>(data.data()), data.size()};
  return Check(::process_vm_writev(pid.value, &local, 1, &remote, 1, 0), data.size(), "write", pid,
               at);
}

Result<> ForceWriteMemory(Pid pid, Vaddr at, std::span<const std::byte> data) {
  const std::string path = fmt::format("/proc/{}/mem", pid.value);
  UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_RDWR));
  return WriteExactlyAt(fd.get(), data, FileOffset(at.value), path);
}

}  // namespace unmoor
