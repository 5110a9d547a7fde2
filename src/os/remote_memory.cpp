// See remote_memory.h.
#include "os/remote_memory.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <vector>

#include "os/file.h"
#include "os/process_control.h"

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

Result<MemoryOfStopped> MemoryOfStopped::Open(Pid pid) {
  UNMOOR_ASSIGN(Fd pidfd, OpenPidFd(pid));
  UNMOOR_ASSIGN(Fd memory, OpenFile(fmt::format("/proc/{}/mem", pid.value), O_RDWR));
  return MemoryOfStopped(pid, std::move(pidfd), std::move(memory));
}

Result<> MemoryOfStopped::Write(Vaddr at, std::span<const std::byte> data, bool writable) const {
  if (writable) return WriteMemory(pid_, at, data);
  return WriteExactlyAt(memory_.get(), data, FileOffset(at.value),
                        fmt::format("/proc/{}/mem", pid_.value));
}

void MemoryOfStopped::MakeHuge(std::span<const Vaddr> blocks) const {
  constexpr int kAdviceCollapse = 25;  // MADV_COLLAPSE
  for (size_t first = 0; first < blocks.size(); first += IOV_MAX) {
    const auto some = blocks.subspan(first, std::min<size_t>(IOV_MAX, blocks.size() - first));
    std::vector<std::byte> zeros(some.size());
    std::vector<iovec> bytes, ranges;
    uint64_t end = 0;  // of the last range
    for (const Vaddr block : some) {
      // SAFETY: addresses of the other process, only used by the kernel.
      bytes.push_back({reinterpret_cast<void*>(block.value), 1});
      const bool follows = !ranges.empty() && block.value == end;
      if (follows) {
        ranges.back().iov_len += kHugePageSize;
      } else {
        ranges.push_back({bytes.back().iov_base, kHugePageSize});
      }
      end = block.value + kHugePageSize;
    }
    // A block without any page is passed over, so each gets its first.
    const iovec local{zeros.data(), zeros.size()};
    (void)::process_vm_writev(pid_.value, &local, 1, bytes.data(), bytes.size(), 0);
    // Range by range: one that fails would end the others.
    for (const iovec& range : ranges) {
      (void)::syscall(SYS_process_madvise, pidfd_.get(), &range, 1, kAdviceCollapse, 0);
    }
  }
}

}  // namespace unmoor
