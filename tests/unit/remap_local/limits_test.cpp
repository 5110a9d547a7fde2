// What a process may have is used up: the remap stands still with a line that says what lacks, the
// memory is right meanwhile, and it goes on when asked once there is enough again.
//
// Each case is a process of its own, whose limits are its own.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "fixture.h"
#include "limited_group.h"
#include "os/own_memory.h"

namespace hazards {
namespace {

using unmoor::BackgroundRemapper;
using unmoor::RemapStatus;
using unmoor::Status;
using unmoor::StatusCode;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SKIP_WITH_SHADOW_MEMORY() \
  GTEST_SKIP() << "a sanitizer's own memory and mappings count against the limit"
#else
#define SKIP_WITH_SHADOW_MEMORY() static_cast<void>(0)
#endif

class Limits : public Hazard {
 protected:
  // It stands still for want of memory, saying `what`, and the bytes are right.
  bool Stands(BackgroundRemapper& remapper, const std::string& what) {
    const Status status = remapper.Wait(kLimit);
    const auto progress = remapper.progress();
    EXPECT_EQ(status.code(), StatusCode::kNoMemory) << status.message();
    EXPECT_NE(status.message().find(what), std::string::npos) << status.message();
    EXPECT_EQ(progress.status, RemapStatus::kLater);
    EXPECT_EQ(progress.reason, status.message());
    EXPECT_FALSE(progress.running);
    ExpectPattern(0, size());
    return !HasFailure();
  }
  bool GoesOn(BackgroundRemapper& remapper) {
    remapper.Resume();
    const Status status = remapper.Wait(kLimit);
    EXPECT_TRUE(status.ok()) << status.message();
    ExpectPattern(0, size());
    return !HasFailure();
  }
};

// --- mappings ------------------------------------------------------------------------------------

size_t CountMappings() {
  std::ifstream maps("/proc/self/maps");
  size_t count = 0;
  for (std::string line; std::getline(maps, line);) ++count;
  return count;
}

// Mappings of one page each, so that `spare` of what the process may have are left.
class ManyMappings {
 public:
  explicit ManyMappings(size_t spare) {
    const size_t limit = unmoor::MaxMapCount();
    size_ = 2 * limit * kPage;
    begin_ = static_cast<char*>(
        ::mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    size_t wanted = limit - spare - CountMappings();
    for (size_t page = 1; wanted > 0; page += 2, wanted -= std::min<size_t>(wanted, 2)) {
      if (::mprotect(begin_ + page * kPage, kPage, PROT_READ) != 0) break;
    }
  }
  ManyMappings(const ManyMappings&) = delete;
  ManyMappings& operator=(const ManyMappings&) = delete;
  ~ManyMappings() { ::munmap(begin_, size_); }

 private:
  char* begin_;
  size_t size_;
};

TEST_F(Limits, WithoutMappingsToSpareItStandsAndGoesOnWhenThereAreSome) {
  SKIP_WITH_SHADOW_MEMORY();
  MakeImage(8 * kMiB);
  EXPECT_TRUE(InChild([&] {
    Map();
    std::optional<ManyMappings> many(std::in_place, 30);
    auto remapper = Start();
    if (!Stands(remapper, "vm.max_map_count")) return false;
    many.reset();
    return GoesOn(remapper);
  }));
}

// They were there when it looked: swaps fail in the kernel.
TEST_F(Limits, MappingsUsedUpDuringTheRemapLeaveRightMemory) {
  SKIP_WITH_SHADOW_MEMORY();
  MakeImage(160 * kMiB);  // swapped in parts
  EXPECT_TRUE(InChild([&] {
    Map();
    unmoor::RemapOptions options;
    options.bytes_per_second = 64 << 20;
    auto remapper = Start(unmoor::Guard::kFreeze, true, options);
    while (remapper.progress().done_bytes == 0) ::usleep(1000);
    std::optional<ManyMappings> many(std::in_place, 0);
    remapper.FinishNow();
    if (!Stands(remapper, "Cannot allocate memory")) return false;
    many.reset();
    return GoesOn(remapper);
  }));
}

// On anonymous memory MADV_DONTNEED needs no mapping; on an image it would take two.
TEST_F(Limits, GivenBackWithoutMappingsToSpareStillReadsZero) {
  SKIP_WITH_SHADOW_MEMORY();
  MakeImage(8 * kMiB);
  for (const bool alone : {true, false}) {
    EXPECT_TRUE(InChild([&] {
      Map();
      unmoor::RemapOptions options;
      options.bytes_per_second = 1 << 20;
      auto remapper = Start(unmoor::Guard::kFreeze, true, options);
      remapper.Pause();
      std::atomic<bool> over{false};
      std::thread other([&] {
        while (!over && !alone) ::usleep(1000);
      });
      std::optional<ManyMappings> many(std::in_place, 0);
      char* part = memory() + 3 * kMiB;
      bool right = true;
      for (int i = 0; i < 20 && right; ++i) {
        std::fill_n(part + kPage, 4 * kPage, 1);
        right = ::madvise(part, kMiB, MADV_DONTNEED) == 0;
        for (size_t at = 0; at < kMiB && right; at += 8) {
          right = *reinterpret_cast<volatile uint64_t*>(part + at) == 0;
        }
      }
      over = true;
      other.join();
      many.reset();
      ExpectPattern(0, 3 * kMiB);
      ExpectPattern(4 * kMiB, size());
      remapper.FinishNow();
      return right && remapper.Wait(kLimit).ok() && *part == 0 && !HasFailure();
    })) << (alone ? "alone" : "with another thread");
  }
}

// --- memory --------------------------------------------------------------------------------------

uint64_t DataBytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmData:")) return std::stoull(line.substr(7)) << 10;
  }
  return 0;
}

TEST_F(Limits, AtTheLimitOfDataItStandsAndGoesOnWhenThereIsRoom) {
  SKIP_WITH_SHADOW_MEMORY();
  MakeImage(64 * kMiB);
  EXPECT_TRUE(InChild([&] {
    Map();
    rlimit before{};
    ::getrlimit(RLIMIT_DATA, &before);
    const rlimit tight{DataBytes() + 48 * kMiB, before.rlim_max};
    if (::setrlimit(RLIMIT_DATA, &tight) != 0) return false;
    auto remapper = Start();
    if (!Stands(remapper, "staging")) return false;
    ::setrlimit(RLIMIT_DATA, &before);
    return GoesOn(remapper);
  }));
}

// The kernel would kill the process: direct-mapped pages can be dropped, anonymous ones cannot.
TEST_F(Limits, AtTheLimitOfItsControlGroupItStandsAndGoesOnWhenThereIsRoom) {
  SKIP_WITH_SHADOW_MEMORY();
  const unmoor::LimitedGroup group(96 * kMiB);
  if (!group.made()) GTEST_SKIP() << "cannot make a control group that limits memory";
  MakeImage(160 * kMiB);
  EXPECT_TRUE(InChild([&] {
    Map();
    if (!group.Enter()) return false;
    auto remapper = Start();
    if (!Stands(remapper, group.directory())) return false;
    EXPECT_GT(remapper.progress().done_bytes, 0U);
    return group.SetLimit(512 * kMiB) && GoesOn(remapper);
  }));
}

// --- a swap that fails ---------------------------------------------------------------------------

// Run by the next, with the fault injected.
TEST_F(Limits, DISABLED_ChildMeetsAFailingSwap) {
  MakeImage(8 * kMiB);
  Map();
  auto remapper = Start();
  const Status status = remapper.Wait(kLimit);
  EXPECT_EQ(status.code(), StatusCode::kSystem);
  EXPECT_EQ(status.message(), "fault injected at local.before_swap");
  EXPECT_EQ(remapper.progress().status, RemapStatus::kLater);
  ExpectPattern(0, size());
  EXPECT_TRUE(GoesOn(remapper));
}

TEST_F(Limits, AnErrorOfASwapLeavesRightMemoryAndItGoesOnWhenAsked) {
  char self[4096] = {};
  ASSERT_GT(::readlink("/proc/self/exe", self, sizeof(self) - 1), 0);
  const std::string command =
      std::string("UNMOOR_FAULT=local.before_swap:error ") + self +
      " --gtest_filter=Limits.DISABLED_Child* --gtest_also_run_disabled_tests >&2";
  EXPECT_EQ(std::system(command.c_str()), 0);
}

// --- what Start itself needs ---------------------------------------------------------------------

TEST_F(Limits, WithoutDescriptorsOrThreadsItIsNotStarted) {
  SKIP_WITH_SHADOW_MEMORY();
  MakeImage(4 * kMiB);
  EXPECT_TRUE(InChild([&] {
    Map();
    rlimit files{};
    ::getrlimit(RLIMIT_NOFILE, &files);
    const rlimit no_files{3, files.rlim_max};
    ::setrlimit(RLIMIT_NOFILE, &no_files);
    const auto without_files = BackgroundRemapper::Start(map());
    ::setrlimit(RLIMIT_NOFILE, &files);
    EXPECT_EQ(without_files.status().code(), StatusCode::kSystem);
    EXPECT_EQ(without_files.status().errnum(), EMFILE) << without_files.status().message();

    // The C library keeps stacks of threads that have ended for the next: these have them.
    std::atomic<bool> over{false};
    std::vector<std::thread> others;
    for (int i = 0; i < 16; ++i) {
      others.emplace_back([&] {
        while (!over) ::usleep(1000);
      });
    }
    rlimit data{};
    ::getrlimit(RLIMIT_DATA, &data);
    const rlimit no_stack{DataBytes() + kMiB, data.rlim_max};
    ::setrlimit(RLIMIT_DATA, &no_stack);
    unmoor::RemapOptions options;
    options.on_complete = [](RemapStatus) { ADD_FAILURE() << "was never started"; };
    const auto without_threads = BackgroundRemapper::Start(map(), options);
    ::setrlimit(RLIMIT_DATA, &data);
    over = true;
    for (std::thread& other : others) other.join();
    EXPECT_FALSE(without_threads.ok());
    EXPECT_NE(without_threads.status().message().find("thread"), std::string::npos)
        << without_threads.status().message();

    ExpectPattern(0, size());
    auto remapper = BackgroundRemapper::Start(map());
    return remapper.ok() && remapper->Wait(kLimit).ok() && !HasFailure();
  }));
}

}  // namespace
}  // namespace hazards
