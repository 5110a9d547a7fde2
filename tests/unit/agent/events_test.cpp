// What a direct-mapped program may do with its memory, while it is watched and while it is being
// remapped: all of it must read as with anonymous memory. And fork, exec and exit meanwhile.
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <thread>

#include "agent/hold_off.h"
#include "agent_fixture.h"
#include "os/process_control.h"

namespace unmoor::testing_agent {
namespace {

// Every way to change a mapping, in a part of the memory of its own, each result checked at once.
class Hazards {
 public:
  Hazards(const PageImage& image, Signals& signals)
      : image_(image), signals_(signals), memory_(image, signals) {}

  void Run() {
    GivesMemoryBack();
    Protects();
    MapsOver();
    Grows();
    MovesAwayAndBack();
    memory_.CheckAll("after all");
  }
  Memory& memory() { return memory_; }

 private:
  void GivesMemoryBack() {
    memory_.Write(10);
    memory_.GiveBack(8, 8, MADV_DONTNEED);
    CheckRange(4, 20, "after MADV_DONTNEED");
    memory_.Write(12);
    CheckRange(4, 20, "after writing there");
    memory_.GiveBack(10, 4, MADV_DONTNEED);
    CheckRange(4, 20, "after a second MADV_DONTNEED");
    // MADV_FREE may keep or zero a page; of an image nothing may come back but what was there.
    memory_.GiveBack(40, 8, MADV_DONTNEED);
    if (::madvise(memory_.At(40), 8 * kPageSize, MADV_FREE) == 0)
      CheckRange(40, 48, "after MADV_FREE");
  }

  void Protects() {
    Expect(::mprotect(memory_.At(64), 16 * kPageSize, PROT_READ) == 0, "mprotect");
    CheckRange(60, 84, "read-only");
    Expect(::mprotect(memory_.At(64), 16 * kPageSize, PROT_READ | PROT_WRITE) == 0, "mprotect");
    memory_.Write(70);
    CheckRange(60, 84, "writable again");
    Expect(::mprotect(memory_.At(66), kPageSize, PROT_NONE) == 0, "mprotect");
    Expect(::mprotect(memory_.At(66), kPageSize, PROT_READ | PROT_WRITE) == 0, "mprotect");
    CheckRange(60, 84, "accessible again");
  }

  void MapsOver() {
    // SAFETY: over a part of our own mapping.
    void* over = ::mmap(memory_.At(100), 8 * kPageSize, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    Expect(over == memory_.At(100), "mmap over");
    for (uint64_t page = 100; page < 108; ++page) memory_.Expect(page, 0);
    CheckRange(96, 112, "mapped over");
    Expect(::munmap(memory_.At(120), 8 * kPageSize) == 0, "munmap");
    over = ::mmap(memory_.At(120), 8 * kPageSize, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    Expect(over == memory_.At(120), "mmap after munmap");
    for (uint64_t page = 120; page < 128; ++page) memory_.Expect(page, 0);
    memory_.Write(125);
    CheckRange(116, 132, "unmapped and mapped");
  }

  // The upper half moves elsewhere and grows; what is new there reads zero.
  void Grows() {
    const uint64_t half = memory_.pages() / 2;
    const uint64_t length = half * kPageSize;
    memory_.Write(half + 1);
    void* moved = ::mremap(memory_.At(half), length, length + 64 * kPageSize, MREMAP_MAYMOVE);
    if (moved == MAP_FAILED) return signals_.Fail(fmt::format("mremap: {}", std::strerror(errno)));
    const auto* words = static_cast<const volatile uint64_t*>(moved);
    for (uint64_t page = half; page < half + 64; ++page) {
      if (words[page * 512 + 100] != 0) signals_.Fail("memory grown by mremap is not zero");
    }
    Expect(words[512 + 100] != ImageWord(half + 1), "a page written and moved keeps its content");
    for (uint64_t page = 2; page < half; ++page) {
      if (words[page * 512 + 100] != ImageWord(half + page)) signals_.Fail("a moved page differs");
    }
    // And back to where it was. (In one piece: pages given back are a VMA of their own until the
    // remap is done, and mremap takes one VMA at a time.)
    moved = ::mremap(moved, length + 64 * kPageSize, length, MREMAP_MAYMOVE | MREMAP_FIXED,
                     memory_.At(half));
    Expect(moved == memory_.At(half), "mremap back");
    CheckRange(half, memory_.pages(), "moved there and back");
    memory_.GiveBack(half, 4, MADV_DONTNEED);
    CheckRange(half, half + 8, "given back after mremap");
  }

  // A page that comes back joins its neighbours; nothing of theirs may change.
  void MovesAwayAndBack() {
    const uint64_t page = memory_.pages() / 2 + 32;
    void* away = ::mmap(nullptr, kPageSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void* moved =
        ::mremap(memory_.At(page), kPageSize, kPageSize, MREMAP_MAYMOVE | MREMAP_FIXED, away);
    Expect(moved == away, "mremap of a page");
    moved = ::mremap(away, kPageSize, kPageSize, MREMAP_MAYMOVE | MREMAP_FIXED, memory_.At(page));
    Expect(moved == memory_.At(page), "mremap of a page back");
    CheckRange(page - 8, page + 32, "next to a page moved there and back");
  }

  void CheckRange(uint64_t begin, uint64_t end, const char* when) {
    for (uint64_t page = begin; page < end; ++page) memory_.Check(page, when);
  }
  void Expect(bool holds, const char* what) {
    if (!holds) signals_.Fail(what);
  }

  const PageImage& image_;
  Signals& signals_;
  Memory memory_;
};

class EventsTest : public AgentTest {
 protected:
  void AwaitGo(int step) const {
    while (signals_->go < step) SleepFor(Nanos(200'000));
  }
  // A watched program that then does `body`.
  Pid StartWatched(const std::function<void()>& body) {
    const Pid pid = StartSubject(body);
    AgentOptions options;
    options.remap = false;
    WatchStopped(pid, options);
    return pid;
  }
};

TEST_F(EventsTest, WhileWatchedEverythingReadsAsAnonymousMemoryWould) {
  const PageImage image = MakePageImage(directory_, 1024);
  const Pid pid = StartWatched([&] {
    Hazards hazards(image, *signals_);
    ::raise(SIGSTOP);
    hazards.Run();
    signals_->ready = 1;
    AwaitGo(1);
    hazards.memory().CheckAll("after the remap");
  });
  AwaitReady(1);
  const auto status = QueryStatus(pid);
  ASSERT_TRUE(status);
  EXPECT_EQ(status->status, Status::kLater);
  EXPECT_TRUE(status->agent.has_value());
  const auto report = RemapProcess(pid, {}, {});  // the agent at work is asked and waited for
  ASSERT_TRUE(report) << report.error().message();
  ExpectReady(pid);
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

TEST_F(EventsTest, MemoryShortenedWhileTheAgentIsOutGrowsIntoZeros) {
  const PageImage image = MakePageImage(directory_, 512);
  const Pid pid = StartWatched([&] {
    Memory memory(image, *signals_);
    ::raise(SIGSTOP);
    AwaitGo(1);
    memory.Shorten(200);  // sleeps until the agent is back
    memory.GrowAgain(200);
    signals_->ready = 1;
    AwaitGo(2);
    memory.CheckAll("after the remap");
  });
  {
    auto dump = HoldOff::Begin(pid);
    ASSERT_TRUE(dump && dump->Await(Nanos(10'000'000'000)).value());
    signals_->go = 1;
    ASSERT_TRUE(WaitUntil([&] {
      const auto calls = ReadThreadCalls(pid);
      return calls && calls->waiting_for_event() == 1;
    }));
  }
  AwaitReady(1);
  const auto report = RemapProcess(pid, {}, {});
  ASSERT_TRUE(report) << report.error().message();
  ExpectReady(pid);
  signals_->go = 2;
  ExpectGoodEnd(pid);
}

// The upper part is a mapping of its own by its protection, moved away as a whole.
TEST_F(EventsTest, WhereThePartAboveWasMovedAwayMemoryGrowsIntoZeros) {
  const PageImage image = MakePageImage(directory_, 512);
  const Pid pid = StartWatched([&] {
    Memory memory(image, *signals_);
    ::raise(SIGSTOP);
    constexpr uint64_t kLower = 200;
    const uint64_t size = (memory.pages() - kLower) * kPageSize;
    void* const place =
        ::mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (::mprotect(memory.At(kLower), size, PROT_READ) != 0 ||
        ::mremap(memory.At(kLower), size, size, MREMAP_MAYMOVE | MREMAP_FIXED, place) != place) {
      std::abort();
    }
    memory.GrowAgain(kLower);
  });
  ExpectGoodEnd(pid);
}

TEST_F(EventsTest, WhileRemappedEverythingReadsAsAnonymousMemoryWould) {
  const PageImage image = MakePageImage(directory_, 1024);
  for (int round = 0; round < 4; ++round) {
    signals_->ready = signals_->go = 0;
    const Pid pid = StartSubject([&] {
      std::vector<std::unique_ptr<Hazards>> all;
      for (int i = 0; i < 12; ++i) all.push_back(std::make_unique<Hazards>(image, *signals_));
      ::raise(SIGSTOP);
      for (auto& hazards : all) {
        hazards->Run();
        signals_->laps.fetch_add(1);
      }
      AwaitGo(1);
      for (auto& hazards : all) hazards->memory().CheckAll("after the remap");
    });
    WatchStopped(pid, {});
    ExpectBecomesReady(pid, Nanos(60'000'000'000));
    ExpectNoTraces(pid);
    signals_->go = 1;
    ExpectGoodEnd(pid);
  }
}

TEST_F(EventsTest, ManyThreadsGivingMemoryBackReadZeros) {
  const PageImage image = MakePageImage(directory_, 8192);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    ::raise(SIGSTOP);
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        do {
          memory.Lap(t, 4, true);
        } while (signals_->go == 0);
      });
    }
    for (std::thread& thread : threads) thread.join();
    memory.CheckAll("at the end");
  });
  WatchStopped(pid, {});
  ExpectBecomesReady(pid, Nanos(120'000'000'000));
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

// One thread that writes a page and gives it back again and again: no old content may return.
// On a busy machine too, where a thread empties its pages long after its event was read.
TEST_F(EventsTest, GivingBackTheSamePagesAgainAndAgainReadsZeros) {
  const PageImage image = MakePageImage(directory_, 4096);
  constexpr int kRounds = 6;
  for (int round = 0; round < kRounds && !HasFailure(); ++round) {
    if (round == 1) LoadMachine(5);
    signals_->go = 0;
    const Pid pid = StartSubject([&] {
      Memory memory(image, *signals_);
      ::raise(SIGSTOP);
      while (signals_->go == 0) {
        for (uint64_t page = 3; page < memory.pages(); page += 64) {
          memory.Write(page);
          memory.GiveBack(page, 1, MADV_DONTNEED);
          memory.Check(page, "given back");
        }
        for (uint64_t page = 3; page < memory.pages(); page += 64) memory.Check(page, "later");
      }
      memory.CheckAll("at the end");
    });
    WatchStopped(pid, {});
    ExpectBecomesReady(pid, Nanos(120'000'000'000));
    signals_->go = 1;
    ExpectGoodEnd(pid);
  }
}

TEST_F(EventsTest, AForkedChildIsAdoptedAndItsMemoryBehaves) {
  const PageImage image = MakePageImage(directory_, 4096);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    for (uint64_t page = 0; page < memory.pages(); page += 5) memory.Write(page);
    ::raise(SIGSTOP);
    const pid_t child = ::fork();
    if (child == 0) {
      memory.CheckAll("in the child");
      memory.GiveBack(20, 10, MADV_DONTNEED);
      for (uint64_t page = 0; page < memory.pages(); page += 7) memory.Write(page);
      memory.CheckAll("in the child, written");
      signals_->child = ::getpid();
      AwaitGo(1);
      memory.CheckAll("in the child, later");
      ::_exit(signals_->errors == 0 ? 0 : 1);
    }
    for (uint64_t page = 0; page < memory.pages(); page += 9) memory.Write(page);
    memory.GiveBack(30, 10, MADV_DONTNEED);
    memory.CheckAll("in the parent");
    signals_->ready = 1;
    int status = -1;
    if (::waitpid(child, &status, 0) != child || status != 0) signals_->Fail("the child's end");
    memory.CheckAll("in the parent, later");
  });
  AgentOptions options;
  options.child_delay = Nanos(1'000'000);
  WatchStopped(pid, options);
  AwaitReady(1);
  ASSERT_TRUE(WaitUntil([&] { return signals_->child != 0; }));
  for (const Pid p : {pid, Pid{signals_->child}}) {
    ExpectBecomesReady(p, Nanos(60'000'000'000));
    ExpectNoTraces(p);
  }
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

TEST_F(EventsTest, ManyForksDuringARemap) {
  const PageImage image = MakePageImage(directory_, 8192);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    ::raise(SIGSTOP);  // watched from here on; children born before would not be
    std::thread writer([&] {
      while (signals_->go == 0) memory.Lap(1, 2, false);
    });
    int forks = 0;
    while (signals_->go == 0 || forks < 3) {
      ++forks;
      const pid_t child = ::fork();
      if (child == 0) {
        for (uint64_t page = 0; page < memory.pages(); page += 2) memory.Check(page, "in a child");
        memory.GiveBack(64, 16, MADV_DONTNEED);
        for (uint64_t page = 64; page < 80; ++page) memory.Check(page, "given back in a child");
        ::_exit(signals_->errors == 0 ? 0 : 1);
      }
      int status = -1;
      if (::waitpid(child, &status, 0) != child || status != 0) signals_->Fail("a child's end");
    }
    writer.join();
    memory.CheckAll("at the end");
  });
  WatchStopped(pid, {});
  ExpectBecomesReady(pid, Nanos(120'000'000'000));
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

// The parent goes on with its fork long after its event was read: another has its CPU.
TEST_F(EventsTest, TheChildOfAForkThatLacksACpuIsWatched) {
  if (std::thread::hardware_concurrency() < 2)
    GTEST_SKIP() << "with one CPU the agent lacks it too";
  const PageImage image = MakePageImage(directory_, 1024);
  const auto run_on = [](int first, int last) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    for (int cpu = first; cpu <= last; ++cpu) CPU_SET(cpu, &cpus);
    return ::sched_setaffinity(0, sizeof(cpus), &cpus) == 0;
  };
  const Pid pid = StartWatched([&] {
    Memory memory(image, *signals_);
    ::raise(SIGSTOP);
    AwaitGo(1);
    if (!run_on(0, 0)) signals_->Fail("sched_setaffinity");
    const pid_t child = ::fork();
    if (!run_on(0, CPU_SETSIZE - 1)) signals_->Fail("sched_setaffinity");
    if (child == 0) {
      memory.GiveBack(64, 16, MADV_DONTNEED);
      memory.CheckAll("in the child");
      ::_exit(signals_->errors == 0 ? 0 : 1);
    }
    int status = -1;
    if (::waitpid(child, &status, 0) != child || status != 0) signals_->Fail("the child's end");
    memory.CheckAll("in the parent");
  });
  const std::vector<Pid> agents = FindProcesses("unmoor-agent");
  for (const Pid agent : agents) ASSERT_TRUE(SendSignal(agent, SIGSTOP));
  signals_->go = 1;
  ASSERT_TRUE(WaitUntil([&] {
    const auto calls = ReadThreadCalls(pid);
    return calls && calls->waiting_for_event() == 1;
  }));
  std::atomic<int> refused = -1;
  std::atomic<bool> over = false;
  std::thread other([&] {
    sched_param first{};
    first.sched_priority = 1;
    const bool has_it = run_on(0, 0) && ::sched_setscheduler(0, SCHED_FIFO, &first) == 0;
    refused = has_it ? 0 : errno;
    while (has_it && !over) {
    }
  });
  EXPECT_TRUE(WaitUntil([&] { return refused != -1; }));
  for (const Pid agent : agents) EXPECT_TRUE(SendSignal(agent, SIGCONT));
  ExpectGoodEnd(pid);
  over = true;
  other.join();
  if (refused != 0) GTEST_SKIP() << "SCHED_FIFO is refused: " << std::strerror(refused);
}

// No plan lasts: two threads move a page of theirs away and back all the time.
TEST_F(EventsTest, AProgramThatMovesItsMemoryWithoutPauseIsRemapped) {
  const PageImage image = MakePageImage(directory_, 4096);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    const auto move = [&](uint64_t page) {
      // SAFETY: where nobody maps anything by itself.
      void* away = reinterpret_cast<void*>((uint64_t{1} << 38) + page * kPageSize);
      while (signals_->go == 0) {
        memory.Write(page);
        const auto to = [&](void* from, void* place) {
          if (::mremap(from, kPageSize, kPageSize, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place) {
            return;
          }
          signals_->Fail(
              fmt::format("mremap from {} to {}: {}", from, place, std::strerror(errno)));
        };
        to(memory.At(page), away);
        to(away, memory.At(page));
        memory.Check(page, "moved away and back");
        ++signals_->laps;
      }
    };
    std::thread first(move, 100);
    std::thread second(move, 3000);
    signals_->ready = 1;
    while (signals_->go == 0) memory.Lap(1, 2, false);
    first.join();
    second.join();
    memory.CheckAll("at the end");
  });
  AwaitReady(1);
  EXPECT_EQ(AwaitEnd(StartRemap(pid, {})), 0) << remap_text();
  ExpectReady(pid);
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

TEST_F(EventsTest, ExecDuringARemapEndsIt) {
  const PageImage image = MakePageImage(directory_, 16384);
  for (int round = 0; round < 4; ++round) {
    int pipe_fds[2] = {-1, -1};
    ASSERT_EQ(::pipe(pipe_fds), 0);
    signals_->ready = signals_->go = 0;
    const Pid pid = StartSubject([&] {
      Memory memory(image, *signals_);
      signals_->ready = 1;
      AwaitGo(1);
      ::dup2(pipe_fds[0], 0);
      ::close(pipe_fds[1]);
      ::execl("/bin/cat", "cat", nullptr);
      signals_->Fail("exec");
    });
    AwaitReady(1);
    const Pid command = StartRemap(pid, {});
    (void)WaitUntil([&] { return !FindProcesses("unmoor-helper").empty(); },
                    Nanos(round * 10'000'000));
    signals_->go = 1;
    EXPECT_EQ(AwaitEnd(command), 0) << remap_text();
    EXPECT_TRUE(WaitUntil([&] {
      const auto process = ReadProcess(pid);
      return process && process->name == "cat";
    }));
    ExpectReady(pid);
    ::close(pipe_fds[0]);
    ::close(pipe_fds[1]);
    ExpectGoodEnd(pid);
  }
}

TEST_F(EventsTest, ExitDuringARemapEndsIt) {
  const PageImage image = MakePageImage(directory_, 16384);
  for (int round = 0; round < 4; ++round) {
    signals_->ready = signals_->go = 0;
    const Pid pid = StartSubject([&] {
      Memory memory(image, *signals_);
      std::thread other([&] {
        while (signals_->go == 0) memory.Lap(0, 16, false);
      });
      signals_->ready = 1;
      AwaitGo(1);
      ::_exit(0);
    });
    AwaitReady(1);
    const Pid command = StartRemap(pid, {});
    (void)WaitUntil([&] { return !FindProcesses("unmoor-helper").empty(); },
                    Nanos(round * 10'000'000));
    signals_->go = 1;
    ExpectGoodEnd(pid);
    AwaitEnd(command);
    EXPECT_TRUE(WaitUntil([&] { return FindProcesses("unmoor-agent").empty(); })) << remap_text();
  }
}

}  // namespace
}  // namespace unmoor::testing_agent
