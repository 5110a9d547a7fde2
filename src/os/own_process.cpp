// See own_process.h.
#include "os/own_process.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <system_error>

#include "os/file.h"
#include "os/kernel_abi.h"
#include "os/raw_syscall.h"
#include "os/userfaultfd.h"

namespace unmoor {
namespace {

using raw::Address;
using raw::Call;
using raw::Word;

constexpr long kUserModeOnly = 1;

struct Region {
  uint64_t start, end, categories;
};

// One pass of PAGEMAP_SCAN; `visit` gets each run with its categories.
Result<> Scan(int pagemap, VaddrRange range, kernel::PmScanArg scan,
              const std::function<void(VaddrRange, uint64_t)>& visit) {
  std::array<Region, 512> regions{};
  scan.size = sizeof(scan);
  scan.vec = static_cast<uint64_t>(Address(regions.data()));
  scan.vec_len = regions.size();
  for (uint64_t at = range.begin.value; at < range.end.value;) {
    scan.start = at;
    scan.end = range.end.value;
    scan.walk_end = 0;
    const long count = Call(__NR_ioctl, pagemap, Word(kernel::kPagemapScan), Address(&scan));
    if (count < 0) {
      return SystemError(static_cast<int>(-count), fmt::format("cannot scan pages of {}", range));
    }
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
      visit({Vaddr(regions[i].start), Vaddr(regions[i].end)}, regions[i].categories);
    }
    if (scan.walk_end <= at) break;
    at = scan.walk_end;
  }
  return {};
}

void Append(std::vector<VaddrRange>& ranges, VaddrRange range) {
  if (!ranges.empty() && ranges.back().end == range.begin) {
    ranges.back().end = range.end;
  } else {
    ranges.push_back(range);
  }
}

}  // namespace

Result<Fd> CreateOwnUserFaultFd(uint64_t features) {
  const long fd = Call(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK | kUserModeOnly);
  if (fd < 0) return SystemError(static_cast<int>(-fd), "userfaultfd");
  Fd uffd(static_cast<int>(fd));
  UNMOOR_TRY(UffdHandshake(uffd.get(), features));
  return uffd;
}

int MoveOwnPages(int uffd, Vaddr to, Vaddr from, Bytes length) {
  for (const unsigned long request :
       {static_cast<unsigned long>(UFFDIO_MOVE), static_cast<unsigned long>(UFFDIO_COPY)}) {
    long error = 0;
    for (int idle = 0; length.value > 0 && idle < 1000;) {
      uint64_t argument[5] = {to.value, from.value, length.value, 0, 0};
      error = Call(__NR_ioctl, uffd, Word(request), Address(argument));
      const auto done = static_cast<int64_t>(argument[4]);
      if (error < 0 && error != -EAGAIN) break;
      if (done <= 0) ++idle;
      if (done > 0) {
        const Bytes moved(static_cast<uint64_t>(done));
        to = to + moved;
        from = from + moved;
        length -= moved;
      }
    }
    if (length.value == 0) return 0;
    if (request == UFFDIO_COPY) return error < 0 ? static_cast<int>(-error) : EAGAIN;
  }
  return EAGAIN;
}

int WriteProtectOwn(int uffd, VaddrRange range) {
  uffdio_writeprotect argument{};
  argument.range = {range.begin.value, range.size().value};
  argument.mode = UFFDIO_WRITEPROTECT_MODE_WP;
  for (;;) {
    const long error = Call(__NR_ioctl, uffd, Word(UFFDIO_WRITEPROTECT), Address(&argument));
    if (error != -EAGAIN) return static_cast<int>(-error);
  }
}

Result<ReservedMemory> ReserveOwnMemory(Bytes length, uint64_t congruent_to, bool no_reserve) {
  const Bytes room(length.value + kHugePageSize + 2 * kPageSize);
  const long flags = MAP_PRIVATE | MAP_ANONYMOUS | (no_reserve ? MAP_NORESERVE : 0);
  const long at = Call(__NR_mmap, 0, Word(room.value), PROT_NONE, flags, -1, 0);
  const auto failed = [&](long error) {
    return SystemError(static_cast<int>(-error),
                       fmt::format("no room for {} of staging", HumanBytes(length)));
  };
  if (at < 0 && at > -4096) return failed(at);
  ReservedMemory reserved;
  const Vaddr all(static_cast<uint64_t>(at));
  const uint64_t first = all.value + kPageSize;
  const Vaddr begin(first + (congruent_to - first) % kHugePageSize);
  reserved.memory = {begin, begin + length};
  reserved.whole = {begin - Bytes(kPageSize), begin + length + Bytes(kPageSize)};
  if (all < reserved.whole.begin) UnmapOwn({all, reserved.whole.begin});
  if (reserved.whole.end < all + room) UnmapOwn({reserved.whole.end, all + room});
  if (const int error = ProtectOwn(reserved.memory, PROT_READ | PROT_WRITE); error != 0) {
    UnmapOwn(reserved.whole);
    return failed(-error);
  }
  return reserved;
}

void UnmapOwn(VaddrRange range) {
  // SAFETY: memory this module has mapped; its owner says it is done with it.
  Call(__NR_munmap, Word(range.begin.value), Word(range.size().value));
}

int AdviseOwn(VaddrRange range, int advice) {
  return static_cast<int>(
      -Call(__NR_madvise, Word(range.begin.value), Word(range.size().value), advice));
}

int ProtectOwn(VaddrRange range, int protection) {
  return static_cast<int>(
      -Call(__NR_mprotect, Word(range.begin.value), Word(range.size().value), protection));
}

int ReadOwnMemory(Vaddr to, VaddrRange from) {
  while (!from.empty()) {
    const uint64_t local[2] = {to.value, from.size().value};
    const uint64_t remote[2] = {from.begin.value, from.size().value};
    const long n =
        Call(__NR_process_vm_readv, raw::ProcessId(), Address(local), 1, Address(remote), 1, 0);
    if (n == -EINTR) continue;
    if (n <= 0) return n == 0 ? EFAULT : static_cast<int>(-n);
    to = to + Bytes(static_cast<uint64_t>(n));
    from.begin = from.begin + Bytes(static_cast<uint64_t>(n));
  }
  return 0;
}

int ReadFileInto(int fd, Vaddr to, Bytes length, FileOffset offset) {
  for (Bytes done; done < length;) {
    const long n = Call(__NR_pread64, fd, Word((to + done).value), Word((length - done).value),
                        Word((offset + done).value));
    if (n == -EINTR) continue;
    if (n <= 0) return n == 0 ? ENODATA : static_cast<int>(-n);
    done += Bytes(static_cast<uint64_t>(n));
  }
  return 0;
}

Result<> ScanOwnPages(int pagemap, VaddrRange range, bool written_only,
                      const std::function<void(VaddrRange, bool)>& visit) {
  constexpr uint64_t kNot = kernel::kPageIsFile | kernel::kPageIsPfnZero;
  kernel::PmScanArg scan{};
  scan.flags = kernel::kPmScanWpMatching;
  scan.category_inverted = kNot;
  scan.category_mask =
      kNot | kernel::kPageIsWpAllowed | (written_only ? kernel::kPageIsWritten : 0);
  scan.category_anyof_mask = kernel::kPageIsPresent | kernel::kPageIsSwapped;
  scan.return_mask = kernel::kPageIsWritten;
  return Scan(pagemap, range, scan, [&](VaddrRange run, uint64_t categories) {
    visit(run, (categories & kernel::kPageIsWritten) != 0);
  });
}

Result<std::vector<VaddrRange>> ScanWritten(int pagemap, VaddrRange range, bool new_baseline) {
  kernel::PmScanArg scan{};
  scan.flags = new_baseline ? kernel::kPmScanWpMatching : 0;
  scan.category_mask = kernel::kPageIsWpAllowed | kernel::kPageIsWritten;
  scan.return_mask = kernel::kPageIsWritten;
  std::vector<VaddrRange> written;
  UNMOOR_TRY(Scan(pagemap, range, scan, [&](VaddrRange run, uint64_t) { Append(written, run); }));
  return written;
}

Result<Fd> CreateEventFd() {
  const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) return SystemError(errno, "eventfd");
  return Fd(fd);
}

void SignalEventFd(int fd) {
  const uint64_t one = 1;
  (void)!::write(fd, &one, sizeof(one));
}

Result<std::thread> StartQuietThread(const char* name, std::function<void()> body) {
  sigset_t all, before;
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  Result<std::thread> started;
  try {
    started = std::thread([name, body = std::move(body)] {
      ::prctl(PR_SET_NAME, name);
      body();
    });
  } catch (const std::system_error& error) {
    started = SystemError(error.code().value(), "cannot start a thread");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return started;
}

void RunOnlyWhenIdle(std::thread& thread, bool on) {
  const sched_param parameter{0};
  (void)::pthread_setschedparam(thread.native_handle(), on ? SCHED_IDLE : SCHED_OTHER, &parameter);
}

Nanos ThreadCpuTime() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return Nanos(int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec);
}

}  // namespace unmoor
