// All threads but one in the rendezvous, while others are born and end.
#include "remap/local/rendezvous.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

namespace unmoor::local {
namespace {

class Rendezvous : public ::testing::Test {
 protected:
  void SetUp() override {
    std::thread([] {}).join();  // libc's own handler of the signal is there from now on
    ASSERT_EQ(InstallFreezeHandler(kDefaultFreezeSignal), 0);
    tasks_ = ::open("/proc/self/task", O_RDONLY | O_DIRECTORY);
    ASSERT_GE(tasks_, 0);
  }
  void TearDown() override {
    ::close(tasks_);
    LimitThreads(kMaxThreads);
  }

  // Opens a window as many threads end, in front of one that works on. Nobody works in it.
  void OpenAsThreadsEnd() {
    constexpr int64_t kLimit = 1'000'000'000;
    constexpr int kEnding = 24;
    std::atomic<bool> end{false};
    std::atomic<bool> over{false};
    std::atomic<uint64_t> work{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < kEnding; ++i) {
      threads.emplace_back([&] {
        while (!end) ::usleep(20);
      });
    }
    threads.emplace_back([&] {
      while (!over) ++work;
    });
    end = true;
    EXPECT_GE(HoldReturns(tasks_), 0);
    const WindowAttempt attempt = AwaitEverybody(tasks_, kLimit);
    EXPECT_GE(attempt.error, 0);
    if (attempt.open) {
      ++open_;
      const uint64_t before = work;
      ::usleep(200);
      EXPECT_EQ(work, before) << "in window " << open_;
    }
    CloseWindow();
    over = true;
    for (std::thread& thread : threads) thread.join();
  }

  int tasks_ = -1;
  int open_ = 0;
};

TEST_F(Rendezvous, NoneIsMissedForOthersThatEnd) {
  for (int i = 0; i < 500 && !HasFailure(); ++i) OpenAsThreadsEnd();
  EXPECT_GT(open_, 0);
}

// A directory of our own in place of /proc/self/task: its count (of subdirectories) says that there
// is one thread more than it lists.
TEST_F(Rendezvous, AListThatLacksOneIsNotTaken) {
  constexpr int64_t kLimit = 10'000'000;
  std::string path = ::testing::TempDir() + "rendezvous-XXXXXX";
  ASSERT_NE(::mkdtemp(path.data()), nullptr);
  ASSERT_EQ(::mkdir((path + "/not_listed").c_str(), 0700), 0);
  const int tasks = ::open(path.c_str(), O_RDONLY | O_DIRECTORY);
  EXPECT_EQ(HoldReturns(tasks), -EAGAIN);
  EXPECT_FALSE(AwaitEverybody(tasks, kLimit).open);
  CloseWindow();
  ::close(tasks);
  ::rmdir((path + "/not_listed").c_str());
  ::rmdir(path.c_str());
}

// The table has room for a few of all that are ever born.
TEST_F(Rendezvous, WhoHasEndedIsForgotten) {
  LimitThreads(128);
  for (int i = 0; i < 50 && !HasFailure(); ++i) OpenAsThreadsEnd();
  EXPECT_GT(open_, 0);
}

}  // namespace
}  // namespace unmoor::local
