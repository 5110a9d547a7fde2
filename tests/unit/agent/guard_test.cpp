// The fault guard: threads run on below it, those that touch a guarded window wait and go on, and
// nothing of it reaches the program: no EFAULT, no lost datagram, no signal; not even when the
// helper is killed inside a guarded window.
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <deque>
#include <thread>

#include "agent/helper_protocol.h"
#include "agent/inject.h"
#include "agent_fixture.h"
#include "os/process_control.h"
#include "os/remote_memory.h"

namespace unmoor::testing_agent {
namespace {

constexpr uint64_t kPages = 2048;  // of each area
constexpr int kAreas = 6;

std::atomic<uint64_t> g_null_checks{0};
std::atomic<int> g_wrong_faults{0};

// As a JVM's: a read through a null pointer is an expected event. The instruction is skipped.
void OnNullCheck(int /*signal*/, siginfo_t* info, void* context) {
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (info->si_code != SEGV_MAPERR || reinterpret_cast<uint64_t>(info->si_addr) != 8) {
    g_wrong_faults.fetch_add(1);
    ::signal(SIGSEGV, SIG_DFL);
    return;
  }
  g_null_checks.fetch_add(1);
  registers[REG_RIP] += 3;
}

void CheckNull() {
  // SAFETY: mov 8(%rax),%al is three bytes long; the handler skips it.
  asm volatile("xor %%eax, %%eax\n .byte 0x8a, 0x40, 0x08" ::: "rax", "memory");
}

std::atomic<uint64_t> g_signals_seen{0};
std::atomic<int> g_signals_wrong{0};

void OnNumberedSignal(int /*signal*/, siginfo_t* info, void* /*context*/) {
  const uint64_t expected = g_signals_seen.fetch_add(1);
  if (static_cast<uint64_t>(info->si_value.sival_int) != expected) g_signals_wrong.fetch_add(1);
}

// A program all of whose threads work in memory mapped from a page image.
class Subject {
 public:
  Subject(const PageImage& image, Signals& signals) : signals_(signals) {
    for (int i = 0; i < kAreas; ++i) memories_.emplace_back(image, signals);
  }

  // Writers that make no system call.
  void AddWriters(uint64_t count) {
    for (uint64_t t = 0; t < count; ++t) {
      threads_.emplace_back([this, t, count] {
        while (signals_.go == 0) {
          for (Memory& memory : memories_) memory.Lap(t, count, false);
        }
      });
    }
  }

  // Every round makes system calls that write into mapped pages, each round into others.
  void AddSystemCalls(const PageImage& image) {
    threads_.emplace_back([this, &image] {
      Memory memory(image, signals_);
      int pipe[2], pair[2];
      Expect(::pipe(pipe) == 0 && ::socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) == 0, "sockets");
      uint64_t words[512];
      for (uint64_t round = 1; signals_.go == 0; ++round) {
        // In user mode most of the time, where a window lets it run on, into the next call.
        const auto at = [&](uint64_t i) {
          for (int work = 0; work < 100'000; ++work) asm volatile("" ::: "memory");
          return memory.At((round * 7 + i * 331) % kPages);
        };
        std::fill_n(words, 512, round);
        Expect(::write(pipe[1], words, sizeof(words)) == sizeof(words) &&
                   ::read(pipe[0], at(0), sizeof(words)) == sizeof(words) &&
                   std::memcmp(at(0), words, sizeof(words)) == 0,
               "read");
        Expect(::send(pair[1], words, 64, 0) == 64 &&
                   ::recv(pair[0], at(1), 64, MSG_DONTWAIT) == 64 &&
                   std::memcmp(at(1), words, 64) == 0,
               "recv of a datagram");
        Expect(::getrandom(at(2), 256, 0) == 256, "getrandom");
        Expect(::syscall(SYS_newfstatat, AT_FDCWD, "/", at(3), 0) == 0, "stat");
        Expect(::syscall(SYS_clock_gettime, CLOCK_MONOTONIC, at(4)) == 0, "clock_gettime");
      }
      for (const int fd : {pipe[0], pipe[1], pair[0], pair[1]}) ::close(fd);
    });
  }

  // Two threads that take turns at a priority-inheriting lock in a mapped page.
  void AddLocking(const PageImage& image) {
    lock_memory_.emplace_back(image, signals_);
    // SAFETY: words of a page of our own.
    auto* lock = reinterpret_cast<int*>(lock_memory_[0].At(100));
    auto* counter = reinterpret_cast<volatile uint64_t*>(lock_memory_[0].At(101));
    *lock = 0;
    *counter = 0;
    for (int t = 0; t < 2; ++t) {
      threads_.emplace_back([this, lock, counter] {
        for (uint64_t i = 0; signals_.go == 0; ++i) {
          Expect(::syscall(SYS_futex, lock, FUTEX_LOCK_PI, 0, nullptr) == 0 || errno == EINTR,
                 "FUTEX_LOCK_PI");
          const uint64_t before = *counter;
          *counter = before + 1;
          Expect(*counter == before + 1, "the lock excludes");
          Expect(::syscall(SYS_futex, lock, FUTEX_UNLOCK_PI) == 0, "FUTEX_UNLOCK_PI");
        }
      });
    }
  }

  // Threads whose stack, TLS and thread descriptor lie in mapped pages: the kernel clears the
  // descriptor's id at their end, and join waits for that.
  void AddShortThreads(const PageImage& image) {
    threads_.emplace_back([this, &image] {
      Memory stacks(image, signals_);
      for (uint64_t i = 0; signals_.go == 0; ++i) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstack(&attributes, stacks.At(i % 4 * 256), 256 * kPageSize);
        pthread_t thread;
        const auto body = [](void* argument) -> void* { return argument; };
        void* result = nullptr;
        Expect(pthread_create(&thread, &attributes, body, &stacks) == 0 &&
                   pthread_join(thread, &result) == 0 && result == &stacks,
               "a thread with a mapped stack");
        pthread_attr_destroy(&attributes);
      }
    });
  }

  void AddNullChecks(const PageImage& image) {
    struct sigaction action{};
    action.sa_sigaction = OnNullCheck;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    ::sigaction(SIGSEGV, &action, nullptr);
    threads_.emplace_back([this, &image] {
      Memory memory(image, signals_);
      for (uint64_t page = 0; signals_.go == 0; ++page) {
        CheckNull();
        memory.Write(page % kPages);
        memory.Check((page + kPages / 2) % kPages, "between null checks");
      }
    });
  }

  // One thread gets numbered signals from another while it works, each exactly once and in order.
  void AddNumberedSignals(const PageImage& image) {
    struct sigaction action{};
    action.sa_sigaction = OnNumberedSignal;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    ::sigaction(SIGRTMIN + 3, &action, nullptr);
    threads_.emplace_back([this, &image] {
      Memory memory(image, signals_);
      receiver_ = ::pthread_self();
      receiving_ = true;
      for (uint64_t page = 0; !all_sent_ || g_signals_seen < sent_; ++page) {
        memory.Write(page % kPages);
      }
      memory.CheckAll("below signals");
    });
    threads_.emplace_back([this] {
      while (!receiving_) ::sched_yield();
      while (signals_.go == 0) {
        if (sent_ - g_signals_seen > 100) continue;
        union sigval number{};
        number.sival_int = static_cast<int>(sent_.load());
        sent_.fetch_add(1);
        Expect(::pthread_sigqueue(receiver_, SIGRTMIN + 3, number) == 0, "sigqueue");
      }
      all_sent_ = true;
    });
  }

  void RunToTheEnd() {
    signals_.ready = 1;
    for (std::thread& thread : threads_) thread.join();
    for (Memory& memory : memories_) memory.CheckAll("at the end");
    Expect(g_wrong_faults == 0, "a SIGSEGV that is not the program's own");
    Expect(g_signals_wrong == 0 && g_signals_seen == sent_, "each signal once");
  }

 private:
  void Expect(bool holds, const char* what) {
    if (!holds) signals_.Fail(fmt::format("{}: {}", what, std::strerror(errno)));
  }

  Signals& signals_;
  std::deque<Memory> memories_;
  std::deque<Memory> lock_memory_;
  std::deque<std::thread> threads_;
  pthread_t receiver_{};
  std::atomic<bool> receiving_{false};
  std::atomic<uint64_t> sent_{0};
  std::atomic<bool> all_sent_{false};
};

class GuardTest : public AgentTest {
 protected:
  static AgentOptions Fault() {
    AgentOptions options;
    options.guard = GuardPolicy::kFault;
    return options;
  }

  // Remaps `pid`, then lets it verify everything and end. Returns the windows in which threads ran
  // on.
  uint64_t RemapAndEnd(Pid pid) {
    const auto report = RemapProcess(pid, Fault(), {});
    EXPECT_TRUE(report) << report.error().message();
    ExpectReady(pid);
    ExpectNoTraces(pid);
    signals_->go = 1;
    ExpectGoodEnd(pid);
    return report ? report->guarded : 0;
  }

  void Restart() {
    signals_->go = signals_->ready = signals_->errors = 0;
    signals_->laps = 0;
  }
};

// On a busy machine most windows are freezes, for want of a core for the watch.
constexpr int kMostRounds = 30;

TEST_F(GuardTest, WritersRunOnAndLoseNothing) {
  const PageImage image = MakePageImage(directory_, kPages);
  uint64_t guarded = 0;
  for (int round = 0; round < kMostRounds && guarded == 0; ++round) {
    Restart();
    const Pid pid = StartSubject([&] {
      Subject subject(image, *signals_);
      subject.AddWriters(3);
      subject.RunToTheEnd();
    });
    AwaitReady(1);
    guarded += RemapAndEnd(pid);
  }
  EXPECT_GT(guarded, 0U) << "no window was guarded";
}

TEST_F(GuardTest, SystemCallsThatWriteIntoAWindowSeeNoFault) {
  const PageImage image = MakePageImage(directory_, kPages);
  const Pid pid = StartSubject([&] {
    Subject subject(image, *signals_);
    for (int i = 0; i < 4; ++i) subject.AddSystemCalls(image);
    subject.AddLocking(image);
    subject.AddShortThreads(image);
    subject.RunToTheEnd();
  });
  AwaitReady(1);
  RemapAndEnd(pid);
}

TEST_F(GuardTest, TheProgramsOwnFaultsAndSignalsReachIt) {
  const PageImage image = MakePageImage(directory_, kPages);
  const Pid pid = StartSubject([&] {
    Subject subject(image, *signals_);
    subject.AddWriters(1);
    subject.AddNullChecks(image);
    subject.AddNumberedSignals(image);
    subject.RunToTheEnd();
  });
  AwaitReady(1);
  RemapAndEnd(pid);
}

TEST_F(GuardTest, AProgramStoppedMeanwhileIsRemappedAndStaysStopped) {
  const PageImage image = MakePageImage(directory_, kPages);
  const Pid pid = StartSubject([&] {
    Subject subject(image, *signals_);
    subject.AddWriters(2);
    subject.RunToTheEnd();
  });
  AwaitReady(1);
  const Pid command = StartRemap(pid, Fault());
  EXPECT_TRUE(WaitUntil([&] {
    const auto leftovers = FindLeftovers(pid);
    return (leftovers && !leftovers->empty()) || !MapsImages(pid);
  }));
  SleepFor(Nanos(3'000'000));
  EXPECT_TRUE(SendSignal(pid, SIGSTOP));
  EXPECT_EQ(AwaitEnd(command), 0) << remap_text();
  ExpectNoTraces(pid);
  // Released, a thread stops again as soon as it finds a core.
  EXPECT_TRUE(WaitUntil([&] {
    const auto process = ReadProcess(pid);
    return process && process->state == 'T';
  }));
  EXPECT_TRUE(SendSignal(pid, SIGCONT));
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

enum class Victims { kHelper, kEverything };

class GuardKillTest : public GuardTest, public testing::WithParamInterface<Victims> {
 protected:
  // True once the helper says that a window is guarded; false when the remap is over.
  // `victims`: whom to kill then, known beforehand so that they die together.
  bool AwaitGuardedWindow(Pid pid, Pid command, std::vector<Pid>& victims) {
    uint32_t active = 0;
    std::vector<Leftover> regions;
    for (auto process = ReadProcess(command); process && process->state != 'Z';
         process = ReadProcess(command)) {
      if (regions.empty()) {
        const auto found = FindLeftovers(pid);
        if (found) regions = *found;
        // Parents first: a supervisor would start another worker, which borrows a thread.
        victims.clear();
        if (GetParam() == Victims::kEverything) victims = FindProcesses("unmoor-agent");
        const auto helpers = FindProcesses("unmoor-helper");
        victims.insert(victims.end(), helpers.begin(), helpers.end());
        if (helpers.empty()) regions.clear();
        continue;
      }
      const Vaddr data = regions[0].region + Bytes(helper::kCodeSize);
      const auto read = ReadMemory(pid, data + Bytes(offsetof(helper::Data, guard_active)),
                                   std::as_writable_bytes(std::span(&active, 1)));
      if (!read) regions.clear();
      if (active != 0) return true;
    }
    return false;
  }
};

// Taken out the watch's part in it, the program dies of SIGSEGV.
TEST_P(GuardKillTest, TheHelperKilledInsideAGuardedWindowHarmsNothing) {
  const PageImage image = MakePageImage(directory_, kPages);
  int killed = 0;
  for (int round = 0; round < kMostRounds && (round < 5 || killed == 0) && !HasFailure(); ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    Restart();
    const Pid pid = StartSubject([&] {
      Subject subject(image, *signals_);
      subject.AddWriters(2);
      if (round % 2 == 0) subject.AddSystemCalls(image);
      if (round % 3 == 0) subject.AddNullChecks(image);
      subject.RunToTheEnd();
    });
    AwaitReady(1);
    const Pid command = StartRemap(pid, Fault());
    std::vector<Pid> victims;
    if (AwaitGuardedWindow(pid, command, victims)) {
      ++killed;
      for (const Pid victim : victims) (void)SendSignal(victim, SIGKILL);
    }
    AwaitEnd(command);
    EXPECT_TRUE(WaitUntil([&] { return FindProcesses("unmoor-agent").empty(); }));
    const uint64_t laps = signals_->laps;
    EXPECT_TRUE(WaitUntil([&] { return signals_->laps > laps + 4 || signals_->errors > 0; }))
        << "the program does not go on";
    RemapAndEnd(pid);
  }
  EXPECT_GT(killed, 0) << "no window was guarded";
}

INSTANTIATE_TEST_SUITE_P(Agent, GuardKillTest,
                         testing::Values(Victims::kHelper, Victims::kEverything),
                         [](const auto& info) {
                           return info.param == Victims::kHelper ? "Helper" : "Everything";
                         });

}  // namespace
}  // namespace unmoor::testing_agent
