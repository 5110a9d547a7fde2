// DirtyTracker: exact to the page, before, during and after a remap, and without userfaultfd.
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <set>
#include <thread>

#include "fixture.h"
#include "library/tracked_ranges.h"
#include "unmoor/dirty_tracker.h"

namespace hazards {
namespace {

using unmoor::DirtyTracker;
using unmoor::MemoryRange;

class Tracker : public Hazard {
 protected:
  // Page numbers behind `base`.
  static std::set<size_t> Pages(const std::vector<MemoryRange>& ranges, const char* base) {
    std::set<size_t> pages;
    for (const MemoryRange range : ranges) {
      for (size_t at = 0; at < range.size; at += kPage) {
        pages.insert(static_cast<size_t>(static_cast<char*>(range.begin) + at - base) / kPage);
      }
    }
    return pages;
  }
};

TEST_F(Tracker, ReportsExactlyTheWrittenPages) {
  MakeImage(8 * kMiB);
  Map();
  const MemoryRange range{memory(), size()};
  auto tracker = DirtyTracker::Start(std::span(&range, 1));
  ASSERT_TRUE(tracker.ok()) << tracker.status().message();
  EXPECT_EQ(tracker->mechanism(), DirtyTracker::Mechanism::kWriteProtect);
  ExpectPattern(0, size());  // reading is not writing
  memory()[5 * kPage] = 1;
  memory()[700 * kPage] = 1;
  auto changed = tracker->Changed();
  ASSERT_TRUE(changed.ok());
  EXPECT_EQ(Pages(*changed, memory()), (std::set<size_t>{5, 700}));
  changed = tracker->Reset();
  EXPECT_EQ(Pages(*changed, memory()), (std::set<size_t>{5, 700}));
  EXPECT_TRUE(tracker->Changed()->empty());
  memory()[5 * kPage] = 2;
  ::madvise(memory() + 9 * kPage, kPage, MADV_DONTNEED);
  EXPECT_EQ(Pages(*tracker->Changed(), memory()), (std::set<size_t>{5, 9}));
}

TEST_F(Tracker, SurvivesTheRemapUnderAWriter) {
  MakeImage(16 * kMiB);
  for (const auto guard : {unmoor::Guard::kFreeze, unmoor::Guard::kFault}) {
    for (int round = 0; round < 4; ++round) {
      Map();
      const MemoryRange range{memory(), size()};
      auto tracker = DirtyTracker::Start(std::span(&range, 1));
      ASSERT_TRUE(tracker.ok()) << tracker.status().message();
      std::set<size_t> written{3};
      memory()[3 * kPage] = 1;
      unmoor::RemapOptions options;
      options.tracker = &*tracker;
      std::atomic<bool> over{false};
      std::thread writer([&] {
        for (size_t n = 0; !over; ++n) {
          const size_t page = n * 31 % (size() / kPage / 2) * 2;  // even pages
          written.insert(page);
          memory()[page * kPage] = static_cast<char>(n);
          if (n % 64 == 0) ::usleep(100);
        }
      });
      auto remapper = Start(guard, guard == unmoor::Guard::kFreeze, options);
      EXPECT_TRUE(remapper.Wait(kLimit).ok());
      over = true;
      writer.join();
      EXPECT_EQ(Pages(*tracker->Changed(), memory()), written);
      // And it goes on on the memory that has taken the image's place.
      EXPECT_EQ(Pages(*tracker->Reset(), memory()), written);
      EXPECT_TRUE(tracker->Changed()->empty());
      memory()[11 * kPage] = 1;
      EXPECT_EQ(Pages(*tracker->Changed(), memory()), (std::set<size_t>{11}));
      Unmap();
    }
  }
}

// As in a container whose seccomp filter knows no userfaultfd.
bool ForbidUserFaultFd() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{4, filter};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST_F(Tracker, WithoutUserfaultfdItProtectsAndTheRemapperSaysWhatItLacks) {
  MakeImage(4 * kMiB);
  EXPECT_TRUE(InChild([&] {
    if (!ForbidUserFaultFd()) return false;
    Map();
    const MemoryRange range{memory(), size()};
    auto tracker = DirtyTracker::Start(std::span(&range, 1));
    if (!tracker.ok() || tracker->mechanism() != DirtyTracker::Mechanism::kMprotect) return false;
    memory()[8 * kPage] = 1;
    std::thread([&] { memory()[9 * kPage] = 1; }).join();
    if (Pages(*tracker->Changed(), memory()) != std::set<size_t>{8, 9}) return false;
    if (Pages(*tracker->Reset(), memory()) != std::set<size_t>{8, 9}) return false;
    if (!tracker->Changed()->empty()) return false;
    memory()[8 * kPage] = 2;
    if (Pages(*tracker->Changed(), memory()) != std::set<size_t>{8}) return false;
    // It does not see what is given back, so a checkpoint must not go by it.
    if (!unmoor::TrackedRanges(*tracker).empty()) return false;
    const unmoor::RemapRange remap{range};
    const auto remapper = unmoor::BackgroundRemapper::Start(std::span(&remap, 1));
    return remapper.status().code() == unmoor::StatusCode::kUnsupported;
  }));
}

TEST_F(Tracker, AForkedChildKnowsNothing) {
  MakeImage(4 * kMiB);
  Map();
  const MemoryRange range{memory(), size()};
  auto tracker = DirtyTracker::Start(std::span(&range, 1));
  ASSERT_TRUE(tracker.ok());
  EXPECT_TRUE(InChild([&] {
    memory()[0] = 1;
    return Pages(*tracker->Changed(), memory()).size() == size() / kPage;
  }));
  EXPECT_TRUE(tracker->Changed()->empty());
}

}  // namespace
}  // namespace hazards
