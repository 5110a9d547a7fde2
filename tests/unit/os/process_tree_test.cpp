// Ending a tree of processes that goes on growing.
#include "os/process_tree.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

namespace unmoor {
namespace {

// A child that forks all the time, in turns so short and rare that it is mostly in the middle of
// it.
pid_t StartForking() {
  const pid_t child = ::fork();
  if (child != 0) return child;
  ::setpgid(0, 0);
  const sched_param none{};
  ::sched_setscheduler(0, SCHED_IDLE, &none);
  for (int i = 0; i < 200; ++i) {
    if (::fork() == 0) break;
  }
  for (;;) ::pause();
}

TEST(KillTree, WhatIsJustBeingBornIsKilledToo) {
  std::atomic<bool> over{false};
  std::vector<std::thread> busy;
  for (unsigned i = 0; i < std::thread::hardware_concurrency(); ++i) {
    busy.emplace_back([&over] {
      while (!over) {
      }
    });
  }
  for (int round = 0; round < 10 && !HasFailure(); ++round) {
    int ends[2];  // of a pipe that all of the tree have open
    ASSERT_EQ(::pipe(ends), 0);
    const pid_t root = StartForking();
    ::close(ends[1]);
    ::usleep(10'000 + 5'000 * static_cast<unsigned>(round));
    KillTree(Pid{root});
    ::waitpid(root, nullptr, 0);
    pollfd left = {ends[0], POLLIN, 0};
    EXPECT_EQ(::poll(&left, 1, 10'000), 1) << "somebody has survived round " << round;
    ::kill(-root, SIGKILL);
    ::close(ends[0]);
  }
  over = true;
  for (std::thread& thread : busy) thread.join();
}

}  // namespace
}  // namespace unmoor
