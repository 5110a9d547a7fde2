// Freestanding. The kernel's structures the helper and the worker exchange with it, where the
// distribution's headers may be older than the kernel (Debian 12: 6.1). Sources: the kernel's
// include/uapi/linux/fs.h (PAGEMAP_SCAN, since 6.7; PROCMAP_QUERY, since 6.11),
// include/uapi/linux/userfaultfd.h (UFFDIO_MOVE, since 6.8; UFFD_FEATURE_WP_ASYNC, since 6.7),
// arch/x86/include/uapi/asm/sigcontext.h.
#pragma once

#include <linux/ioctl.h>
#include <linux/types.h>

#include <cstdint>

#ifndef UFFDIO_MOVE
#define UFFDIO_MOVE _IOWR(0xAA, 0x05, uint64_t[5])
#endif

namespace unmoor::kernel {

struct PmScanArg {
  uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
inline constexpr unsigned long kPagemapScan = _IOWR('f', 16, PmScanArg);
inline constexpr uint64_t kPmScanWpMatching = 1, kPmScanCheckWpAsync = 2;
inline constexpr uint64_t kPageIsWpAllowed = 1, kPageIsWritten = 2, kPageIsFile = 4,
                          kPageIsPresent = 8, kPageIsSwapped = 16, kPageIsPfnZero = 32,
                          kPageIsHuge = 64;

struct ProcmapQuery {
  uint64_t size, query_flags, query_addr;
  uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
  uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
  uint64_t vma_name_addr, build_id_addr;
};
static_assert(sizeof(ProcmapQuery) == 104);
inline constexpr unsigned long kProcmapQuery = _IOWR('f', 17, ProcmapQuery);

inline constexpr uint64_t kProcmapQueryCoveringOrNext = 0x10;
inline constexpr uint64_t kProcmapQueryFileBacked = 0x20;
inline constexpr uint64_t kUffdFeatureWpAsync = 1 << 15;
inline constexpr uint64_t kUffdFeatureMove = 1 << 16;

struct KernelSigaction {
  uint64_t handler, flags, restorer, mask;
};

struct KernelSigcontext {  // struct sigcontext_64
  uint64_t r8, r9, r10, r11, r12, r13, r14, r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip,
      eflags;
  uint16_t cs, gs, fs, ss;
  uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
};

struct KernelUcontext {
  uint64_t flags, link;
  uint64_t stack[3];
  KernelSigcontext mcontext;
  uint64_t sigmask;
};

struct KernelIovec {
  void* base;
  unsigned long length;
};

struct KernelMsghdr {
  void* name;
  int namelen;
  KernelIovec* iov;
  unsigned long iovlen;
  void* control;
  unsigned long controllen;
  unsigned int flags;
};

struct KernelCmsghdr {
  unsigned long length;
  int level;
  int type;
};

}  // namespace unmoor::kernel
