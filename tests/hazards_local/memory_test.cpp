// What a program does to its address space while it is remapped: memory given back, unmapped,
// moved, grown, protected.
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>
#include <thread>
#include <vector>

#include "fixture.h"

namespace hazards {
namespace {

using unmoor::Guard;

class Memory : public Hazard {
 protected:
  void SetUp() override {
    Hazard::SetUp();
    MakeImage(8 * kMiB);
  }

  static bool IsZero(const char* at, size_t size) {
    for (size_t i = 0; i < size; ++i) {
      if (at[i] != 0) return false;
    }
    return true;
  }
};

constexpr int kRounds = 12;

TEST_F(Memory, GivenBackReadsZeroFromTheFirstInstructionOn) {
  for (int round = 0; round < 2 * kRounds && !HasFailure(); ++round) {
    Map();
    auto remapper = Start();
    if (round % 2 == 0) remapper.Pause();
    std::atomic<bool> over{false};
    // Two threads, so that nobody knows whose event it is.
    const auto give_back = [&](size_t first, int advice) {
      for (size_t i = 0; !over || i < 8; ++i) {
        char* at = memory() + first + i * 5 * kPage % (4 * kMiB - 3 * kPage);
        ASSERT_EQ(::madvise(at, 3 * kPage, advice), 0) << std::strerror(errno);
        if (advice == MADV_DONTNEED) {
          ASSERT_TRUE(IsZero(at, 3 * kPage)) << i;
        }
        std::memset(at, 7, kPage);
        ASSERT_EQ(at[0], 7);
        ASSERT_EQ(at[kPage - 1], 7);
      }
    };
    std::thread other(give_back, 4 * kMiB, MADV_FREE);
    std::thread one(give_back, 0, MADV_DONTNEED);
    ::usleep(2000);
    remapper.Resume();
    const auto status = remapper.Wait(kLimit);
    EXPECT_TRUE(status.ok()) << status.message();
    over = true;
    one.join();
    other.join();
    Unmap();
  }
}

// Whoever gives memory back waits while somebody cannot be held, who might be just that thread.
TEST_F(Memory, GivingBackWaitsUntilEverybodyCanBeHeld) {
  EXPECT_TRUE(InChild([&] {
    Map();
    auto remapper = Start();
    remapper.Pause();
    std::atomic<bool> go{false};
    std::atomic<bool> given_back{false};
    std::thread giver([&] {
      while (!go) ::usleep(100);
      EXPECT_EQ(::madvise(memory(), kMiB, MADV_DONTNEED), 0) << std::strerror(errno);
      EXPECT_TRUE(IsZero(memory(), kMiB));
      given_back = true;
    });
    rlimit limit{};
    ::getrlimit(RLIMIT_SIGPENDING, &limit);
    const rlimit none{0, limit.rlim_max};
    ::setrlimit(RLIMIT_SIGPENDING, &none);  // no thread can be sent the freeze signal
    go = true;
    ::usleep(300'000);
    EXPECT_FALSE(given_back);
    ::setrlimit(RLIMIT_SIGPENDING, &limit);
    giver.join();
    remapper.Resume();
    EXPECT_TRUE(remapper.Wait(kLimit).ok());
    return !HasFailure();
  }));
}

TEST_F(Memory, UnmappedStaysUnmappedAndMappedOverStays) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    char* hole = memory + 2 * kMiB;
    for (size_t i = 0; !over || i < 4; ++i) {
      ASSERT_EQ(::munmap(hole, kMiB), 0);
      ::usleep(100);
      void* at = ::mmap(hole, kMiB, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
      ASSERT_EQ(at, hole) << std::strerror(errno);
      ASSERT_TRUE(IsZero(hole, kMiB));
      std::memset(hole, 3, kMiB);
      at = ::mmap(hole, kMiB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                  0);
      ASSERT_EQ(at, hole);
      ASSERT_TRUE(IsZero(hole, kMiB));
    }
    ExpectPattern(0, 2 * kMiB);
    ExpectPattern(3 * kMiB, size());
  };
  DuringRemap(kRounds, body);
}

TEST_F(Memory, MovedKeepsItsBytesAndIsRemappedWhereItIs) {
  for (int round = 0; round < kRounds; ++round) {
    Map();
    char* away = static_cast<char*>(
        ::mmap(nullptr, 2 * kMiB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    auto remapper = Start();
    std::thread mover([&] {
      ::usleep(static_cast<useconds_t>(round * 100));
      void* at =
          ::mremap(memory() + 4 * kMiB, 2 * kMiB, 2 * kMiB, MREMAP_MAYMOVE | MREMAP_FIXED, away);
      // EFAULT: part of it is anonymous already, so it is more than one mapping.
      if (at != MAP_FAILED) return;
      EXPECT_EQ(errno, EFAULT);
      away = memory() + 4 * kMiB;
    });
    mover.join();
    EXPECT_TRUE(remapper.Wait(kLimit).ok()) << remapper.progress().reason;
    ExpectPattern(0, 4 * kMiB);
    for (size_t at = 0; at < 2 * kMiB; at += 8) {
      ASSERT_EQ(*reinterpret_cast<uint64_t*>(away + at), PatternAt(4 * kMiB + at));
    }
    const auto status = unmoor::QueryStatus();
    ASSERT_TRUE(status.ok());
    EXPECT_EQ(status->direct_mapped_bytes, 0u) << status->reason;
    if (away != memory() + 4 * kMiB) ::munmap(away, 2 * kMiB);
    Unmap();
  }
}

// Cut off and grown again, in place or by moving: what is new reads zero, never the image's bytes.
TEST_F(Memory, GrownAgainReadsZero) {
  for (int round = 0; round < kRounds; ++round) {
    Map();
    auto remapper = Start();
    if (round % 2 == 0) remapper.Pause();
    char* at = memory();
    ASSERT_EQ(::munmap(at + 6 * kMiB, 2 * kMiB), 0);
    void* grown = ::mremap(at, 6 * kMiB, 8 * kMiB, round % 3 == 0 ? 0 : MREMAP_MAYMOVE);
    if (grown == MAP_FAILED) {
      EXPECT_TRUE(errno == EFAULT || errno == ENOMEM) << std::strerror(errno);
    } else {
      EXPECT_TRUE(IsZero(static_cast<char*>(grown) + 6 * kMiB, 2 * kMiB)) << round;
    }
    remapper.Resume();
    EXPECT_TRUE(remapper.Wait(kLimit).ok()) << remapper.progress().reason;
    const char* now = grown == MAP_FAILED ? at : static_cast<char*>(grown);
    for (size_t i = 0; i < 6 * kMiB; i += 8) {
      ASSERT_EQ(*reinterpret_cast<const uint64_t*>(now + i), PatternAt(i)) << i;
    }
    if (grown != MAP_FAILED) {
      EXPECT_TRUE(IsZero(static_cast<char*>(grown) + 6 * kMiB, 2 * kMiB)) << round;
      ::munmap(grown, 8 * kMiB);
    }
    Unmap();
  }
}

// Where it was cut off is made safe with everybody at rest. Without that the growth itself has to
// be.
TEST_F(Memory, GrownByMovingReadsZeroAlsoWhileAThreadDoesNotComeToRest) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer makes a fork of every vfork, which does not hold its thread";
#endif
  EXPECT_TRUE(InChild([&] {
    ThreadInVfork restless;
    Map();
    auto remapper = Start();
    remapper.Pause();
    restless.Enter();
    char* cut = memory() + 6 * kMiB;
    if (::munmap(cut, 2 * kMiB) != 0) return false;
    ::mmap(cut, kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    void* grown = ::mremap(memory(), 6 * kMiB, 8 * kMiB, MREMAP_MAYMOVE);
    EXPECT_NE(grown, MAP_FAILED) << std::strerror(errno);
    if (grown == MAP_FAILED) return false;
    const char* fresh = static_cast<char*>(grown) + 6 * kMiB;
    EXPECT_TRUE(IsZero(fresh, 2 * kMiB));
    restless.Leave();
    remapper.Resume();
    while (remapper.Wait(kLimit).code() == unmoor::StatusCode::kBusy) remapper.Resume();
    EXPECT_EQ(remapper.progress().status, unmoor::RemapStatus::kReady);
    EXPECT_TRUE(IsZero(fresh, 2 * kMiB));
    return !HasFailure();
  }));
}

TEST_F(Memory, LeftBehindByAMoveIsEmpty) {
  Map();
  auto remapper = Start();
  remapper.Pause();
  // Private file mappings may be moved so since kernel 5.13.
  void* moved = ::mremap(memory(), 2 * kMiB, 2 * kMiB, MREMAP_MAYMOVE | 4 /*DONTUNMAP*/, nullptr);
  if (moved == MAP_FAILED) GTEST_SKIP() << "mremap: " << std::strerror(errno);
  EXPECT_TRUE(IsZero(memory(), 2 * kMiB));
  EXPECT_EQ(*static_cast<uint64_t*>(moved), PatternAt(0));
  remapper.Resume();
  EXPECT_TRUE(remapper.Wait(kLimit).ok());
  EXPECT_TRUE(IsZero(memory(), 2 * kMiB));
  ::munmap(moved, 2 * kMiB);
}

TEST_F(Memory, ProtectionsChangedMeanwhileHold) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    for (size_t i = 0; !over || i < 8; ++i) {
      char* at = memory + i % 8 * kMiB;
      ASSERT_EQ(::mprotect(at, kMiB, PROT_NONE), 0);
      ASSERT_EQ(::mprotect(at, kMiB, PROT_READ), 0);
      int ends[2];
      ASSERT_EQ(::pipe(ends), 0);
      ASSERT_EQ(::write(ends[1], "x", 1), 1);
      ASSERT_EQ(::read(ends[0], at, 1), -1);  // read-only, whoever writes
      ::close(ends[0]);
      ::close(ends[1]);
      ASSERT_EQ(::mprotect(at, kMiB, PROT_READ | PROT_WRITE), 0);
    }
    ExpectPattern(0, size());
  };
  DuringRemap(kRounds, body);
}

}  // namespace
}  // namespace hazards
