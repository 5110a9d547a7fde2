#include "criu/metadata.h"

#include <gmock/gmock.h>
#include <sys/mman.h>

namespace unmoor::criu {
namespace {

Vma PlainAnonymous() {
  Vma vma;
  vma.range = {Vaddr(0x10000), Vaddr(0x20000)};
  vma.prot = PROT_READ | PROT_WRITE;
  vma.flags = MAP_PRIVATE | MAP_ANONYMOUS;
  vma.status = kVmaRegular | kVmaAnonPrivate;
  return vma;
}

TEST(IsTakeable, TakesPrivateAnonymousMemoryAndTheHeap) {
  Vma vma = PlainAnonymous();
  EXPECT_TRUE(IsTakeable(vma));
  vma.status |= kVmaHeap;
  EXPECT_TRUE(IsTakeable(vma));
  vma.flags |= MAP_NORESERVE;
  vma.prot = PROT_NONE;
  EXPECT_TRUE(IsTakeable(vma));
}

TEST(IsTakeable, NeverTakesWhatTheKernelOrCriuTreatsSpecially) {
  for (const uint32_t status :
       {kVmaStack, kVmaVsyscall, kVmaVdso, kVmaVvar, kVmaAioRing, kVmaShadowStack, kVmaGuard,
        kVmaUprobes, kVmaPlugin, kVmaSocket, kVmaSysvIpc, kVmaMemfd, kVmaFilePrivate,
        kVmaFileShared, kVmaAnonShared}) {
    Vma vma = PlainAnonymous();
    vma.status |= status;
    EXPECT_FALSE(IsTakeable(vma)) << std::hex << status;
  }
  for (const int flags : {MAP_GROWSDOWN, MAP_HUGETLB, MAP_LOCKED}) {
    Vma vma = PlainAnonymous();
    vma.flags |= static_cast<uint32_t>(flags);
    EXPECT_FALSE(IsTakeable(vma)) << std::hex << flags;
  }
}

TEST(IsTakeable, NeverTakesSharedDroppableOrWipedOnFork) {
  Vma vma = PlainAnonymous();
  vma.flags = MAP_SHARED | MAP_ANONYMOUS;
  EXPECT_FALSE(IsTakeable(vma));
  vma = PlainAnonymous();
  vma.flags = MAP_ANONYMOUS | 0x08;  // MAP_DROPPABLE
  EXPECT_EQ(WhyNotTakeable(vma), "it is droppable");
  vma = PlainAnonymous();
  vma.madv = uint64_t{1} << 18;
  EXPECT_EQ(WhyNotTakeable(vma), "it is wiped on fork");
  vma = PlainAnonymous();
  vma.madv = uint64_t{1} << 14;  // MADV_HUGEPAGE
  EXPECT_TRUE(IsTakeable(vma));
}

}  // namespace
}  // namespace unmoor::criu
