#include "os/ptrace.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "os/procfs.h"

namespace unmoor {
namespace {

// Of libc's syscall(), which is at the same address in a forked child.
Vaddr SyscallInstruction() {
  const auto* at = reinterpret_cast<const unsigned char*>(&::syscall);
  while (at[0] != 0x0f || at[1] != 0x05) ++at;
  return Vaddr(reinterpret_cast<uint64_t>(at));
}

// A child with a thread beside its leader; both sleep.
Pid StartTwoThreads() {
  int ready[2];
  EXPECT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    std::thread([&] {
      (void)!::write(ready[1], "r", 1);
      for (;;) ::pause();
    }).detach();
    for (;;) ::pause();
  }
  char byte = 0;
  EXPECT_EQ(::read(ready[0], &byte, 1), 1);
  ::close(ready[0]);
  ::close(ready[1]);
  return Pid{child};
}

// Makes threads that end at once, and, behind them, one that works on for a while, for ever.
[[noreturn]] void MakeThreads(std::atomic<uint64_t>& work) {
  for (;;) {
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) threads.emplace_back([] {});
    threads.emplace_back([&] {
      for (int i = 0; i < 20'000; ++i) ++work;
    });
    for (std::thread& thread : threads) thread.join();
  }
}

TEST(Ptrace, NoneIsMissedForOthersThatEnd) {
  void* shared = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  auto& work = *new (shared) std::atomic<uint64_t>(0);
  const pid_t child = ::fork();
  if (child == 0) MakeThreads(work);
  for (int i = 0; i < 1000 && !HasFailure(); ++i) {
    ProgramStop stop(Pid{child});
    ASSERT_TRUE(stop.Stop(Nanos(10'000'000'000), [] { return Result<bool>(false); }));
    const uint64_t before = work;
    ::usleep(300);
    EXPECT_EQ(work, before) << "at stop " << i;
    EXPECT_EQ(CountThreads(Pid{child}), stop.threads().size());
  }
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, __WALL);
  ::munmap(shared, 4096);
}

TEST(Ptrace, ProgramKilledWhileItsLeaderIsBorrowedIsNoticed) {
  const Pid child = StartTwoThreads();
  {
    ProgramStop stop(child);
    ASSERT_TRUE(stop.Stop(Nanos(10'000'000'000), [] { return Result<bool>(false); }));
    ASSERT_EQ(stop.threads().size(), 2u);
    StoppedThread& leader = stop.threads()[0];
    ASSERT_EQ(leader.thread(), child);
    ASSERT_TRUE(leader.BeginRemote());
    std::thread killer([child] {
      while (ReadProcess(child)->state != 'S') std::this_thread::yield();  // it is in pause()
      ::kill(child.value, SIGKILL);
    });
    const auto result = leader.RunRemote(SyscallInstruction(), SYS_pause, {});
    killer.join();
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().errnum(), ESRCH) << result.error().message();
  }
  // Its ends were taken, the leader's too: here the tracer is the parent.
  EXPECT_EQ(::waitpid(child.value, nullptr, __WALL | WNOHANG), -1);
}

}  // namespace
}  // namespace unmoor
