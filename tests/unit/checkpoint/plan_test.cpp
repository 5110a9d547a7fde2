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

// Memory that maps layer 3 at the same distance everywhere.
VmaInfo Layer(uint64_t begin, uint64_t size, uint64_t own = 0) {
  VmaInfo vma = Anonymous(begin, size, own);
  vma.inode = 42;
  vma.offset = FileOffset(begin);
  vma.name = "/image/layers/0.pages";
  vma.vm_flags.insert(vma.vm_flags.end(), {"um", "uw"});
  return vma;
}

std::vector<PlannedVma> PlanMapped(const std::vector<VmaInfo>& vmas,
                                   std::vector<VaddrRange> whole) {
  MappedLayers layers;
  layers.find = [](const VmaInfo& vma) {
    return vma.inode == 42 ? std::optional<uint32_t>(3) : std::nullopt;
  };
  layers.whole = std::move(whole);
  return PlanTask(vmas, {}, layers);
}

TEST(CheckpointPlan, WhatMapsALayerIsAnonymousMemoryHoweverLittleOfItIsTheProgramsOwn) {
  const auto plan = PlanMapped({Layer(0x10000000, 4 * kMiB)}, {});
  ASSERT_EQ(plan.size(), 1u);
  EXPECT_TRUE(plan[0].mapped) << plan[0].why;
  EXPECT_TRUE(plan[0].vma.IsPrivateAnonymous());
  EXPECT_FALSE(plan[0].vma.HasFlag("uw"));
  ASSERT_EQ(plan[0].pieces.size(), 1u);
  EXPECT_EQ(plan[0].pieces[0].layer, 3u);
  EXPECT_EQ(plan[0].pieces[0].offset, FileOffset(0x10000000));
}

TEST(CheckpointPlan, PartsOfAMappedVmaAreOneAgain) {
  constexpr uint64_t kAt = 0x10000000;
  const VaddrRange whole{Vaddr(kAt), Vaddr(kAt + 6 * kMiB)};
  const std::vector<VmaInfo> vmas = {Layer(kAt, 2 * kMiB), Anonymous(kAt + 2 * kMiB, 2 * kMiB, 0),
                                     Layer(kAt + 4 * kMiB, 2 * kMiB)};
  const auto plan = PlanMapped(vmas, {whole});
  ASSERT_EQ(plan.size(), 1u);
  EXPECT_EQ(plan[0].vma.range, whole);
  EXPECT_EQ(plan[0].pieces.size(), 2u);
  EXPECT_EQ(PlanMapped(vmas, {}).size(), 3u) << "not known to have been one";
  std::vector<VmaInfo> protections = vmas;
  protections[1].prot = PROT_READ;
  EXPECT_EQ(PlanMapped(protections, {whole}).size(), 3u);
  std::vector<VmaInfo> advice = vmas;
  advice[2].vm_flags.push_back("dc");
  EXPECT_EQ(PlanMapped(advice, {whole}).size(), 2u);
}

}  // namespace
}  // namespace unmoor
