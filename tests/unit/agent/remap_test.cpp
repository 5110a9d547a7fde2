// Remapping real processes that do nothing out of the ordinary: what is left in them, what they
// notice.
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <ctime>
#include <thread>

#include "agent_fixture.h"
#include "os/file.h"
#include "os/process_control.h"

namespace unmoor::testing_agent {
namespace {

class RemapTest : public AgentTest {
 protected:
  static void AwaitGo(Signals& signals, int step) {
    while (signals.go < step) SleepFor(Nanos(200'000));
  }

  void ExpectRemapped(Pid pid, const AgentOptions& options = {}) {
    const auto report = RemapProcess(pid, WithGuard(options), {});
    ASSERT_TRUE(report) << report.error().message();
    ExpectReady(pid);
  }
};

std::vector<std::string> Descriptors(Pid pid) {
  const auto names = ListDirectory(fmt::format("/proc/{}/fd", pid.value));
  return names ? *names : std::vector<std::string>{"?"};
}

TEST_F(RemapTest, MemoryIsOneAnonymousVmaAndNothingIsLeft) {
  const PageImage image = MakePageImage(directory_, 5000);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    for (uint64_t page = 0; page < memory.pages(); page += 3) memory.Write(page);
    signals_->address = reinterpret_cast<uint64_t>(memory.data());
    signals_->ready = 1;
    AwaitGo(*signals_, 1);
    memory.CheckAll("after the remap");
  });
  AwaitReady(1);
  const VaddrRange range{Vaddr(signals_->address),
                         Vaddr(signals_->address + image.pages * kPageSize)};
  const auto maps = ReadMaps(pid);
  ASSERT_TRUE(maps);
  const auto fds = Descriptors(pid);
  const auto before = VmasOf(pid, range);
  ASSERT_EQ(before.size(), 1U);
  const auto status = QueryStatus(pid);
  ASSERT_TRUE(status);
  EXPECT_EQ(status->status, Status::kLater);
  EXPECT_EQ(status->direct_mapped, range.size());
  EXPECT_NE(status->reason.find("no agent at work"), std::string::npos) << status->reason;

  ExpectRemapped(pid);
  const auto after = VmasOf(pid, range);
  ASSERT_EQ(after.size(), 1U) << "the pieces did not join";
  EXPECT_EQ(after[0].range, range);
  EXPECT_TRUE(after[0].IsPrivateAnonymous());
  EXPECT_EQ(after[0].name, "");
  EXPECT_EQ(after[0].prot, before[0].prot);
  EXPECT_FALSE(after[0].HasFlag("hg"));
  EXPECT_FALSE(after[0].HasFlag("dc"));
  const auto maps_after = ReadMaps(pid);
  ASSERT_TRUE(maps_after);
  ASSERT_EQ(maps_after->size(), maps->size());
  for (size_t i = 0; i < maps->size(); ++i) {
    EXPECT_EQ((*maps_after)[i].range, (*maps)[i].range);
    EXPECT_EQ((*maps_after)[i].prot, (*maps)[i].prot);
  }
  EXPECT_EQ(Descriptors(pid), fds);
  EXPECT_EQ(ReadThreads(pid)->size(), 1U);
  EXPECT_TRUE(ReadChildren(pid)->empty());
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

TEST_F(RemapTest, TheReportSaysWhatWasDone) {
  const PageImage image = MakePageImage(directory_, 4096);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    signals_->ready = 1;
    AwaitGo(*signals_, 1);
  });
  AwaitReady(1);
  int calls = 0;
  const auto report = RemapProcess(pid, {}, [&](const RemapReport&) { ++calls; });
  ASSERT_TRUE(report) << report.error().message();
  EXPECT_EQ(report->total, Bytes(4096 * kPageSize / 8 * 7));
  EXPECT_EQ(report->done, report->total);
  EXPECT_GE(report->windows, 1U);
  EXPECT_GT(report->longest_pause.value, 0);
  EXPECT_GE(calls, 1);
  // Once more: nothing to do, nothing done.
  const auto again = RemapProcess(pid, {}, {});
  ASSERT_TRUE(again) << again.error().message();
  EXPECT_EQ(again->done, Bytes(0));
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

TEST_F(RemapTest, ThreadsThatWriteWithoutPauseLoseNothing) {
  const PageImage image = MakePageImage(directory_, 8192);
  constexpr uint64_t kThreads = 4;
  for (const auto thp : {ThpPolicy::kAuto, ThpPolicy::kNever}) {
    signals_->go = signals_->ready = 0;
    signals_->laps = 0;
    const Pid pid = StartSubject([&] {
      Memory memory(image, *signals_);
      std::vector<std::thread> threads;
      for (uint64_t t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
          while (signals_->go == 0) memory.Lap(t, kThreads, false);
        });
      }
      signals_->ready = 1;
      for (std::thread& thread : threads) thread.join();
      memory.CheckAll("at the end");
    });
    AwaitReady(1);
    AgentOptions options;
    options.thp = thp;
    ExpectRemapped(pid, options);
    const uint64_t laps = signals_->laps;
    EXPECT_TRUE(WaitUntil([&] { return signals_->laps > laps + kThreads; }));
    signals_->go = 1;
    ExpectGoodEnd(pid);
  }
}

// Each thread sleeps in another system call and may see nothing of the remap but EINTR.
TEST_F(RemapTest, SleepingThreadsNoticeNothingButEintr) {
  const PageImage image = MakePageImage(directory_, 2048);
  const int event_fd = ::eventfd(0, EFD_CLOEXEC);
  int pipe_fds[2] = {-1, -1};
  ASSERT_EQ(::pipe2(pipe_fds, O_CLOEXEC), 0);
  auto* word = reinterpret_cast<int*>(&signals_->child);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    const auto until_done = [&](const char* name, const std::function<long()>& call) {
      signals_->laps.fetch_add(1);
      long result = -1;
      while ((result = call()) < 0 && errno == EINTR) signals_->interrupted.fetch_add(1);
      if (result < 0) signals_->Fail(fmt::format("{}: errno {}", name, errno));
      if (signals_->go == 0) signals_->Fail(fmt::format("{} returned early", name));
    };
    std::vector<std::thread> threads;
    threads.emplace_back([&] {
      until_done("epoll_wait", [&] {
        const int epoll = ::epoll_create1(EPOLL_CLOEXEC);
        epoll_event event{EPOLLIN, {}};
        ::epoll_ctl(epoll, EPOLL_CTL_ADD, event_fd, &event);
        const long n = ::epoll_wait(epoll, &event, 1, -1);
        const int saved = errno;
        ::close(epoll);
        errno = saved;
        return n;
      });
    });
    threads.emplace_back([&] {
      until_done("read", [&] {
        char byte = 0;
        return ::read(pipe_fds[0], &byte, 1);
      });
    });
    threads.emplace_back([&] {
      until_done("futex",
                 [&] { return ::syscall(SYS_futex, word, FUTEX_WAIT, 0, nullptr, nullptr, 0); });
    });
    threads.emplace_back([&] {
      until_done("poll", [&] {
        pollfd poll{event_fd, POLLIN, 0};
        return static_cast<long>(::poll(&poll, 1, -1));
      });
    });
    std::thread sleeper([&] {
      timespec left{600, 0};
      signals_->laps.fetch_add(1);
      while (::nanosleep(&left, &left) != 0 && errno == EINTR) signals_->interrupted.fetch_add(1);
      signals_->Fail("nanosleep returned early");
    });
    sleeper.detach();
    signals_->ready = 1;
    for (std::thread& thread : threads) thread.join();
    memory.CheckAll("at the end");
  });
  AwaitReady(1);
  const auto all_asleep = [&] {
    const auto calls = ReadThreadCalls(pid);
    return signals_->laps == 5 && calls && calls->blocked.size() == 6;
  };
  ASSERT_TRUE(WaitUntil(all_asleep));
  ExpectRemapped(pid);
  EXPECT_TRUE(WaitUntil(all_asleep)) << "a thread no longer sleeps";
  EXPECT_EQ(ReadThreads(pid)->size(), 6U);
  signals_->go = 1;
  const uint64_t one = 1;
  EXPECT_EQ(::write(event_fd, &one, sizeof(one)), 8);
  EXPECT_EQ(::write(pipe_fds[1], "x", 1), 1);
  signals_->child = 1;
  ::syscall(SYS_futex, word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
  ExpectGoodEnd(pid);
  ::close(event_fd);
  ::close(pipe_fds[0]);
  ::close(pipe_fds[1]);
}

TEST_F(RemapTest, AStoppedProgramStaysStoppedAndIsRemapped) {
  const PageImage image = MakePageImage(directory_, 4096);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    for (uint64_t page = 0; page < memory.pages(); page += 5) memory.Write(page);
    ::raise(SIGSTOP);
    signals_->ready = 1;
    memory.CheckAll("after SIGCONT");
  });
  const auto stopped = [&] {
    const auto process = ReadProcess(pid);
    return process && process->state == 'T';
  };
  ASSERT_TRUE(WaitUntil(stopped));
  ExpectRemapped(pid);
  EXPECT_TRUE(WaitUntil(stopped));  // back in its stop, through a moment of neither
  EXPECT_EQ(signals_->ready, 0);
  EXPECT_TRUE(SendSignal(pid, SIGCONT));
  ExpectGoodEnd(pid);
}

TEST_F(RemapTest, ProtectionsAndAdviceAreAsBefore) {
  const PageImage image = MakePageImage(directory_, 4096);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    for (uint64_t page = 0; page < memory.pages(); page += 5) memory.Write(page);
    signals_->address = reinterpret_cast<uint64_t>(memory.data());
    ::mprotect(memory.At(100), 50 * kPageSize, PROT_READ);
    ::mprotect(memory.At(600), 900 * kPageSize, PROT_NONE);
    ::mprotect(memory.At(2000), 8 * kPageSize, PROT_READ | PROT_EXEC);
    ::madvise(memory.At(2500), 600 * kPageSize, MADV_DONTDUMP);
    ::madvise(memory.At(3500), 64 * kPageSize, MADV_NOHUGEPAGE);
    signals_->ready = 1;
    AwaitGo(*signals_, 1);
    ::mprotect(memory.data(), memory.pages() * kPageSize, PROT_READ | PROT_WRITE);
    memory.CheckAll("after the remap");
  });
  AwaitReady(1);
  const VaddrRange range{Vaddr(signals_->address),
                         Vaddr(signals_->address + image.pages * kPageSize)};
  const auto before = VmasOf(pid, range);
  ExpectRemapped(pid);
  const auto after = VmasOf(pid, range);
  ASSERT_EQ(after.size(), before.size());
  for (size_t i = 0; i < after.size(); ++i) {
    EXPECT_EQ(after[i].range, before[i].range);
    EXPECT_EQ(after[i].prot, before[i].prot) << fmt::format("{}", after[i].range);
    for (const char* flag : {"hg", "nh", "dd", "dc", "mg", "nr"}) {
      EXPECT_EQ(after[i].HasFlag(flag), before[i].HasFlag(flag))
          << fmt::format("{} {}", after[i].range, flag);
    }
    EXPECT_TRUE(after[i].IsPrivateAnonymous());
  }
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

TEST_F(RemapTest, AProgramStartedStoppedRunsWithoutNoticingSigcont) {
  const PageImage image = MakePageImage(directory_, 4096);
  static Signals* shared = nullptr;
  shared = signals_;
  const Pid pid = StartSubject([&] {
    ::signal(SIGCONT, [](int) { shared->Fail("SIGCONT was seen"); });
    Memory memory(image, *signals_);
    ::raise(SIGSTOP);
    memory.GiveBack(3, 10, MADV_DONTNEED);
    memory.CheckAll("right after it was let go");
    AwaitGo(*signals_, 1);
    memory.CheckAll("after the remap");
  });
  WatchStopped(pid, {});
  ExpectBecomesReady(pid, Nanos(60'000'000'000));
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

}  // namespace
}  // namespace unmoor::testing_agent
