// See kernel_features.h. The kernel's headers of the build machine may be older than the running
// kernel, so the numbers of newer interfaces are written out here.
#include "os/kernel_features.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "base/units.h"
#include "os/fd.h"
#include "os/file.h"

namespace unmoor {
namespace {

// linux/fs.h, from 6.7: struct pm_scan_arg and PAGEMAP_SCAN.
struct PagemapScanArgument {
  uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
constexpr unsigned long kPagemapScan = _IOWR('f', 16, PagemapScanArgument);

// linux/fs.h, from 6.11: struct procmap_query and PROCMAP_QUERY.
struct ProcmapQueryArgument {
  uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset;
  uint64_t inode;
  uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
  uint64_t vma_name_addr, build_id_addr;
};
constexpr unsigned long kProcmapQuery = _IOWR('f', 17, ProcmapQueryArgument);

// linux/userfaultfd.h, from 5.19: USERFAULTFD_IOC_NEW of /dev/userfaultfd.
constexpr unsigned long kUserfaultfdNew = _IO(0xAA, 0x00);

uint64_t UffdApi(int fd) {
  uffdio_api api{};
  api.api = UFFD_API;
  return ::ioctl(fd, UFFDIO_API, &api) == 0 ? api.features : 0;
}

void ProbeUffd(KernelFeatures& features) {
  const Fd by_call(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
  features.uffd_system_call = by_call.valid();
  if (by_call.valid()) features.uffd_features = UffdApi(by_call.get());
  const Fd device(::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
  if (!device.valid()) return;
  const Fd by_device(::ioctl(device.get(), kUserfaultfdNew, O_CLOEXEC | O_NONBLOCK));
  features.uffd_device = by_device.valid();
  if (by_device.valid() && !by_call.valid()) features.uffd_features = UffdApi(by_device.get());
}

void ProbeProcfs(KernelFeatures& features) {
  auto scratch = Mapping::Anonymous(kPageSize);
  if (!scratch) return;
  scratch->writable_bytes()[0] = std::byte{1};
  // SAFETY: the address is only handed to the kernel as a number.
  const auto address = reinterpret_cast<uint64_t>(scratch->bytes().data());

  const Fd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  uint64_t region[3] = {};
  PagemapScanArgument scan{};
  scan.size = sizeof scan;
  scan.start = address;
  scan.end = address + kPageSize;
  // SAFETY: as above; the kernel writes at most one region of 24 bytes.
  scan.vec = reinterpret_cast<uint64_t>(region);
  scan.vec_len = 1;
  constexpr uint64_t kPageIsPresent = 1u << 3;
  scan.category_mask = kPageIsPresent;
  scan.return_mask = kPageIsPresent;
  features.pagemap_scan = ::ioctl(pagemap.get(), kPagemapScan, &scan) == 1;

  // Without CONFIG_MEM_SOFT_DIRTY the bit is never set, not even on a page just written.
  uint64_t entry = 0;
  const auto offset = static_cast<off_t>(address / kPageSize * sizeof entry);
  features.soft_dirty = ::pread(pagemap.get(), &entry, sizeof entry, offset) == sizeof entry &&
                        (entry >> 55 & 1) != 0;

  const Fd maps(::open("/proc/self/maps", O_RDONLY | O_CLOEXEC));
  ProcmapQueryArgument query{};
  query.size = sizeof query;
  query.query_addr = address;
  features.procmap_query = ::ioctl(maps.get(), kProcmapQuery, &query) == 0;
}

bool ProbePtrace() {
  const pid_t child = ::fork();
  if (child < 0) return false;
  if (child == 0) {
    for (;;) ::pause();
  }
  const bool seized = ::ptrace(PTRACE_SEIZE, child, 0, 0) == 0;
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, __WALL);
  return seized;
}

Capabilities ReadCapabilities() {
  Capabilities have;
  const auto status = ReadFile("/proc/self/status");
  if (!status) return have;
  const size_t at = status->find("CapEff:");
  if (at == std::string::npos) return have;
  const uint64_t bits = std::strtoull(status->c_str() + at + 7, nullptr, 16);
  have.sys_ptrace = (bits >> 19 & 1) != 0;
  have.sys_admin = (bits >> 21 & 1) != 0;
  have.sys_resource = (bits >> 24 & 1) != 0;
  have.checkpoint_restore = (bits >> 40 & 1) != 0;
  return have;
}

ThpSetting ReadThp() {
  const auto text = ReadFile("/sys/kernel/mm/transparent_hugepage/enabled");
  if (!text) return ThpSetting::kAbsent;
  if (text->find("[always]") != std::string::npos) return ThpSetting::kAlways;
  if (text->find("[madvise]") != std::string::npos) return ThpSetting::kMadvise;
  return ThpSetting::kNever;
}

}  // namespace

const char* ToString(ThpSetting setting) {
  switch (setting) {
    case ThpSetting::kNever:
      return "never";
    case ThpSetting::kMadvise:
      return "madvise";
    case ThpSetting::kAlways:
      return "always";
    case ThpSetting::kAbsent:
      return "absent";
  }
  return "absent";
}

bool CanNameMemory() {
  const auto page = Mapping::Anonymous(kPageSize);
  if (!page) return false;
  // SAFETY: the address is only handed to the kernel as a number.
  const auto address = reinterpret_cast<uint64_t>(page->bytes().data());
  return ::prctl(kPrSetVma, kPrSetVmaAnonName, address, kPageSize, "unmoor") == 0;
}

KernelFeatures KernelFeatures::Probe() {
  KernelFeatures features;
  utsname name{};
  if (::uname(&name) == 0) {
    features.release = name.release;
    features.machine = name.machine;
    (void)std::sscanf(name.release, "%d.%d", &features.major, &features.minor);
  }
  ProbeUffd(features);
  ProbeProcfs(features);
  features.ptrace_seize = ProbePtrace();
  features.named_memory = CanNameMemory();
  if (const auto scope = ReadFile("/proc/sys/kernel/yama/ptrace_scope")) {
    features.yama_scope = std::atoi(scope->c_str());
  }
  features.thp = ReadThp();
  struct statfs run{};
  features.run_is_tmpfs = ::statfs("/run", &run) == 0 && run.f_type == TMPFS_MAGIC;
  features.capabilities = ReadCapabilities();
  return features;
}

}  // namespace unmoor
