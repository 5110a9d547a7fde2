// System calls that write into memory being remapped: none fails, none loses anything.
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "fixture.h"

namespace hazards {
namespace {

class SystemCalls : public Hazard {
 protected:
  void SetUp() override {
    Hazard::SetUp();
    MakeImage(6 * kMiB);
  }
  // With what is set up now the remap stands and names `what`; after `end` it goes on.
  void ExpectWaits(const char* what, const std::function<void()>& end) {
    Map();
    auto remapper = Start();
    const auto waiting = remapper.Wait(kLimit);
    EXPECT_EQ(waiting.code(), unmoor::StatusCode::kBusy) << waiting.message();
    EXPECT_NE(waiting.message().find(what), std::string::npos) << waiting.message();
    const auto progress = remapper.progress();
    EXPECT_EQ(progress.status, unmoor::RemapStatus::kLater);
    EXPECT_EQ(progress.done_bytes, 0u);
    end();
    remapper.Resume();
    const auto status = remapper.Wait(kLimit);
    EXPECT_TRUE(status.ok()) << status.message();
    ExpectPattern(0, size());
  }
};

// Both guards: under kFault a range written by system calls is frozen for.
constexpr unmoor::Guard kGuards[] = {unmoor::Guard::kFreeze, unmoor::Guard::kFault};
constexpr int kRounds = 12;

TEST_F(SystemCalls, ReadNeverFailsAndLosesNothing) {
  constexpr size_t kChunk = 32768;
  std::vector<char> content(64 * kChunk);
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 7 + i / kChunk);
  const int file = ::memfd_create("content", MFD_CLOEXEC);
  ASSERT_EQ(::write(file, content.data(), content.size()), ssize_t(content.size()));
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    for (size_t i = 0; !over || i < 8; ++i) {
      char* to = memory + i * 3 * kChunk % (size() - kChunk);
      const size_t from = i % 64 * kChunk;
      ASSERT_EQ(::pread(file, to, kChunk, static_cast<off_t>(from)), ssize_t(kChunk))
          << std::strerror(errno);
      ASSERT_EQ(std::memcmp(to, content.data() + from, kChunk), 0);
    }
  };
  for (const auto guard : kGuards) DuringRemap(kRounds, body, guard);
  ::close(file);
}

TEST_F(SystemCalls, NoDatagramIsLost) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    int ends[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_DGRAM, 0, ends), 0);
    std::atomic<bool> enough{false};
    std::thread sender([&] {
      uint64_t message[128];
      for (uint64_t n = 1; !enough; ++n) {
        for (uint64_t& word : message) word = n;
        if (::send(ends[0], message, sizeof(message), 0) != sizeof(message)) break;
      }
      ::shutdown(ends[0], SHUT_WR);
      ::close(ends[0]);
    });
    uint64_t expected = 1;
    for (size_t i = 0; !over || i < 8; ++i) {
      auto* to = reinterpret_cast<uint64_t*>(memory + i * kPage * 5 % (size() - kPage));
      const ssize_t n = ::recv(ends[1], to, 1024, 0);
      EXPECT_EQ(n, 1024) << std::strerror(errno);
      EXPECT_EQ(to[0], expected);
      EXPECT_EQ(to[127], expected);
      if (n != 1024 || to[0] != expected) break;
      ++expected;
    }
    enough = true;
    ::close(ends[1]);
    sender.join();
  };
  for (const auto guard : kGuards) DuringRemap(kRounds, body, guard);
}

TEST_F(SystemCalls, GetrandomAndStatNeverFail) {
  struct stat expected{};
  ASSERT_EQ(::stat("/proc/self/exe", &expected), 0);
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    for (size_t i = 0; !over || i < 8; ++i) {
      char* to = memory + i * kPage * 3 % (size() - 2 * kPage);
      ASSERT_EQ(::getrandom(to, 2048, 0), 2048) << std::strerror(errno);
      auto* info = reinterpret_cast<struct stat*>(to + kPage);
      ASSERT_EQ(::stat("/proc/self/exe", info), 0) << std::strerror(errno);
      ASSERT_EQ(info->st_ino, expected.st_ino);
      ASSERT_EQ(info->st_size, expected.st_size);
    }
  };
  for (const auto guard : kGuards) DuringRemap(kRounds, body, guard);
}

TEST_F(SystemCalls, PriorityInheritingLocksWork) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    auto* mutex = reinterpret_cast<pthread_mutex_t*>(memory + 2 * kMiB);
    auto* count = reinterpret_cast<uint64_t*>(memory + 4 * kMiB);
    pthread_mutexattr_t attributes;
    ::pthread_mutexattr_init(&attributes);
    ::pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
    ASSERT_EQ(::pthread_mutex_init(mutex, &attributes), 0);
    *count = 0;
    std::atomic<uint64_t> expected{0};
    const auto lock_often = [&] {
      for (size_t i = 0; !over || i < 8; ++i) {
        ASSERT_EQ(::pthread_mutex_lock(mutex), 0);
        ++*count;
        ASSERT_EQ(::pthread_mutex_unlock(mutex), 0);
        ++expected;
      }
    };
    std::thread other(lock_often);
    lock_often();
    other.join();
    EXPECT_EQ(*count, expected);
  };
  for (const auto guard : kGuards) DuringRemap(kRounds, body, guard);
}

TEST_F(SystemCalls, TheOwnersDeathReachesARobustLock) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    auto* mutex = reinterpret_cast<pthread_mutex_t*>(memory + 3 * kMiB);
    pthread_mutexattr_t attributes;
    ::pthread_mutexattr_init(&attributes);
    ::pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    ASSERT_EQ(::pthread_mutex_init(mutex, &attributes), 0);
    for (size_t i = 0; !over || i < 8; ++i) {
      std::thread([&] { EXPECT_EQ(::pthread_mutex_lock(mutex), 0); }).join();
      ASSERT_EQ(::pthread_mutex_lock(mutex), EOWNERDEAD);
      ASSERT_EQ(::pthread_mutex_consistent(mutex), 0);
      ASSERT_EQ(::pthread_mutex_unlock(mutex), 0);
    }
  };
  for (const auto guard : kGuards) DuringRemap(kRounds, body, guard);
}

TEST_F(SystemCalls, DirectReadsFromDiskArriveWhole) {
  constexpr size_t kChunk = 262144;
  std::vector<char> content(16 * kChunk);
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 31 + i / kPage);
  const std::string path = directory() + ".content";
  const int out = ::open(path.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
  ASSERT_EQ(::write(out, content.data(), content.size()), ssize_t(content.size()));
  ::fsync(out);
  ::close(out);
  const int file = ::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (file < 0) GTEST_SKIP() << "no O_DIRECT in /tmp";
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    for (size_t i = 0; !over || i < 8; ++i) {
      char* to = memory + i * kChunk * 3 % (size() - kChunk);
      const size_t from = i % 16 * kChunk;
      ASSERT_EQ(::pread(file, to, kChunk, static_cast<off_t>(from)), ssize_t(kChunk))
          << std::strerror(errno);
      ASSERT_EQ(std::memcmp(to, content.data() + from, kChunk), 0);
    }
  };
  for (const auto guard : kGuards) DuringRemap(kRounds, body, guard);
  ::close(file);
}

TEST_F(SystemCalls, SplicedPagesKeepTheirBytes) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    char seen[kPage];
    for (size_t i = 0; !over || i < 8; ++i) {
      char* from = memory + i * kPage * 7 % (size() - kPage);
      std::memset(from, static_cast<int>(i), kPage);
      const iovec piece{from, kPage};
      ASSERT_EQ(::vmsplice(ends[1], &piece, 1, 0), ssize_t(kPage));
      ASSERT_EQ(::read(ends[0], seen, kPage), ssize_t(kPage));
      ASSERT_EQ(std::memcmp(seen, from, kPage), 0);
    }
    ::close(ends[0]);
    ::close(ends[1]);
  };
  for (const auto guard : kGuards) DuringRemap(kRounds, body, guard);
}

// A ring may have buffers registered, which the kernel writes behind the page tables.
TEST_F(SystemCalls, WithAnIoUringTheRemapWaitsAndSaysSo) {
  char parameters[120] = {};
  const int ring = static_cast<int>(::syscall(SYS_io_uring_setup, 4, parameters));
  if (ring < 0) GTEST_SKIP() << "no io_uring here: " << std::strerror(errno);
  ExpectWaits("io_uring", [&] { ::close(ring); });
}

// Its file is closed and its memory is mapped: it lives on, with what it has under way.
TEST_F(SystemCalls, WithAnIoUringThatIsOnlyMappedTheRemapWaits) {
  char parameters[120] = {};
  const int ring = static_cast<int>(::syscall(SYS_io_uring_setup, 4, parameters));
  if (ring < 0) GTEST_SKIP() << "no io_uring here: " << std::strerror(errno);
  void* entries =
      ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, ring, 0x10000000 /*SQEs*/);
  ASSERT_NE(entries, MAP_FAILED);
  ::close(ring);
  ExpectWaits("io_uring", [&] { ::munmap(entries, kPage); });
}

TEST_F(SystemCalls, WithLinuxAioTheRemapWaitsAndSaysSo) {
  aio_context_t context = 0;
  if (::syscall(SYS_io_setup, 4, &context) != 0) {
    GTEST_SKIP() << "no Linux AIO here: " << std::strerror(errno);
  }
  ExpectWaits("Linux AIO", [&] { ::syscall(SYS_io_destroy, context); });
}

// A ring that only another process has open any more shows nowhere; what is registered with it
// shows as pinned.
TEST_F(SystemCalls, WithPinnedMemoryTheRemapWaitsAndSaysSo) {
  char parameters[120] = {};
  const int ring = static_cast<int>(::syscall(SYS_io_uring_setup, 4, parameters));
  if (ring < 0) GTEST_SKIP() << "no io_uring here: " << std::strerror(errno);
  Map();
  const iovec buffer{memory() + kMiB, kPage};
  ASSERT_EQ(::syscall(SYS_io_uring_register, ring, 0 /*buffers*/, &buffer, 1), 0);
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t holder = ::fork();
  if (holder == 0) {
    ::close(ends[1]);
    char byte;
    (void)!::read(ends[0], &byte, 1);
    ::_exit(0);
  }
  ::close(ends[0]);
  ::close(ring);
  auto remapper = Start();
  const auto waiting = remapper.Wait(kLimit);
  EXPECT_EQ(waiting.code(), unmoor::StatusCode::kBusy) << waiting.message();
  EXPECT_NE(waiting.message().find("4096 bytes"), std::string::npos) << waiting.message();
  EXPECT_EQ(remapper.progress().done_bytes, 0u);
  ::close(ends[1]);
  ASSERT_EQ(::waitpid(holder, nullptr, 0), holder);
  auto status = waiting;  // the kernel lets go of it in its own time
  for (int i = 0; i < 600 && status.code() == unmoor::StatusCode::kBusy; ++i) {
    ::usleep(100'000);
    status = remapper.Wait(kLimit);
  }
  EXPECT_TRUE(status.ok()) << status.message();
  ExpectPattern(0, size());
}

// setuid and its kin signal all threads with the signal our rendezvous stands in front of.
TEST_F(SystemCalls, ChangingIdsOfAllThreadsWorks) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    for (size_t i = 0; !over || i < 8; ++i) {
      ASSERT_EQ(::setresuid(::getuid(), ::geteuid(), static_cast<uid_t>(-1)), 0);
      memory[i * kPage % size()] = static_cast<char>(i);
      ::usleep(200);
    }
  };
  DuringRemap(kRounds, body);
}

}  // namespace
}  // namespace hazards
