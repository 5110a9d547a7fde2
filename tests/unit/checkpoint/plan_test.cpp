// The plan of a dump: what may be mapped, and what must stay with CRIU.
#include "checkpoint/plan.h"

#include <gmock/gmock.h>
#include <sys/mman.h>

#include <string>
#include <vector>

namespace unmoor {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

VmaInfo Anonymous(uint64_t begin, uint64_t size, uint64_t resident) {
  VmaInfo vma;
  vma.range = {Vaddr(begin), Vaddr(begin + size)};
  vma.prot = PROT_READ | PROT_WRITE;
  vma.anonymous = Bytes(resident);
  vma.rss = Bytes(resident);
  vma.vm_flags = {"rd", "wr", "mr", "mw", "me", "ac", "sd"};
  return vma;
}

VmaInfo WithFlag(std::string flag) {
  VmaInfo vma = Anonymous(0x10000000, 4 * kMiB, 4 * kMiB);
  vma.vm_flags.push_back(std::move(flag));
  return vma;
}

bool IsMapped(const VmaInfo& vma) {
  return PlanTask(std::vector{vma}, {}).at(0).mapped;
}

TEST(CheckpointPlan, PrivateAnonymousMemoryGoesToTheLayer) {
  VmaInfo vma = Anonymous(0x10000000, 4 * kMiB, 4 * kMiB);
  EXPECT_TRUE(IsMapped(vma));
  vma.name = "[heap]";
  EXPECT_TRUE(IsMapped(vma));
  vma.name = "[anon:jemalloc]";
  EXPECT_TRUE(IsMapped(vma));
}

TEST(CheckpointPlan, ProtectionDoesNotDecide) {
  for (const int prot : {PROT_NONE, PROT_READ, PROT_READ | PROT_EXEC}) {
    VmaInfo vma = Anonymous(0x10000000, 4 * kMiB, 4 * kMiB);
    vma.prot = prot;
    EXPECT_TRUE(IsMapped(vma)) << prot;
  }
}

TEST(CheckpointPlan, FewPagesStayWithCriu) {
  EXPECT_FALSE(IsMapped(Anonymous(0x10000000, 64 * kMiB, 0)));
  EXPECT_FALSE(IsMapped(Anonymous(0x10000000, 64 * kMiB, 60 << 10)));
  EXPECT_TRUE(IsMapped(Anonymous(0x10000000, 64 * kMiB, 64 << 10)));
}

TEST(CheckpointPlan, HugePageAdviceIsNoHindrance) {
  EXPECT_TRUE(IsMapped(WithFlag("hg")));
  EXPECT_TRUE(IsMapped(WithFlag("nh")));
  EXPECT_TRUE(IsMapped(WithFlag("dd")));
  EXPECT_TRUE(IsMapped(WithFlag("dc")));
}

TEST(CheckpointPlan, WhatAFileMappingCannotStandInForStaysWithCriu) {
  for (const char* flag : {"gd", "ht", "lo", "wf", "dp", "ss", "gu", "io", "pf", "um", "uw"}) {
    const auto plan = PlanTask(std::vector{WithFlag(flag)}, {});
    EXPECT_FALSE(plan.at(0).mapped) << flag;
    EXPECT_FALSE(plan.at(0).why.empty()) << flag;
  }
}

TEST(CheckpointPlan, SharedAndFileMemoryStaysWithCriu) {
  VmaInfo shared = Anonymous(0x10000000, 4 * kMiB, 4 * kMiB);
  shared.shared = true;
  EXPECT_FALSE(IsMapped(shared));
  VmaInfo file = Anonymous(0x10000000, 4 * kMiB, 4 * kMiB);
  file.inode = 42;
  file.dev_major = 254;
  file.name = "/usr/lib/libc.so.6";
  EXPECT_FALSE(IsMapped(file));
  for (const char* name : {"[vdso]", "[vvar]", "[vsyscall]"}) {
    VmaInfo special = Anonymous(0x10000000, 4 * kMiB, 4 * kMiB);
    special.name = name;
    EXPECT_FALSE(IsMapped(special)) << name;
  }
}

}  // namespace
}  // namespace unmoor
