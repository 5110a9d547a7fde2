// Parts of the agent killed with -9 while a program works: its memory stays right, and the remap is
// completed, by the supervisor's next worker or by the next RemapProcess.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <random>
#include <thread>

#include "agent/progress_file.h"
#include "agent/supervisor.h"
#include "agent_fixture.h"
#include "os/process_control.h"

namespace unmoor::testing_agent {
namespace {

class FaultsTest : public AgentTest {
 protected:
  // Threads that check, write and give back all the time, watched from before they start.
  Pid StartWorkingSubject(const PageImage& image) {
    signals_->go = signals_->ready = signals_->errors = 0;
    signals_->laps = 0;
    const Pid pid = StartSubject([this, &image] {
      Memory memory(image, *signals_);
      ::raise(SIGSTOP);
      std::vector<std::thread> threads;
      for (uint64_t t = 0; t < 2; ++t) {
        threads.emplace_back([&, t] {
          while (signals_->go == 0) memory.Lap(t, 2, true);
        });
      }
      for (std::thread& thread : threads) thread.join();
      memory.CheckAll("at the end");
    });
    AgentOptions watch;
    watch.remap = false;
    WatchStopped(pid, watch);
    return pid;
  }

  // Killed together, so that the supervisor starts no worker that knows nothing of this program;
  // and not while a thread of the program executes a system call for one of them: that is the one
  // moment in which -9 harms the program (docs/guarantees.md).
  void KillAgents(Pid program) { KillUnlessBorrowing(program, FindProcesses("unmoor-agent")); }

  static void KillUnlessBorrowing(Pid program, const std::vector<Pid>& agents) {
    const auto is_agent = [&](Pid pid) { return std::ranges::find(agents, pid) != agents.end(); };
    for (bool borrowing = true; borrowing;) {
      for (const Pid agent : agents) {
        (void)SendSignal(agent, SIGSTOP);
        EXPECT_TRUE(WaitUntil([&] {
          const auto process = ReadProcess(agent);
          return !process || process->state == 'T' || process->state == 'Z';
        }));
      }
      const auto threads = ReadThreads(program);
      borrowing = threads && std::ranges::any_of(*threads, [&](Pid thread) {
                    const auto process = ReadProcess(thread);
                    return process && is_agent(process->tracer);
                  });
      for (const Pid agent : agents) (void)SendSignal(agent, borrowing ? SIGCONT : SIGKILL);
      if (borrowing) SleepFor(Nanos(200'000));
    }
  }

  // Its agent has said what it is about to do, which is the end of its beginning.
  static bool IsInside(Pid pid) {
    const auto progress = ReadProgress(pid);
    const auto worker = progress ? ReadProcess(progress->worker) : MachineError("no progress");
    return worker && !worker->ended();
  }

  void ExpectCompletes(Pid pid) {
    EXPECT_EQ(AwaitEnd(StartRemap(pid, {})), 0) << remap_text();
    Result<ProcessStatus> status = QueryStatus(pid);
    EXPECT_TRUE(WaitUntil([&] {
      status = QueryStatus(pid);
      return status && status->status == Status::kReady;
    })) << (status ? status->reason : status.error().message());
    ExpectNoTraces(pid);
    const uint64_t laps = signals_->laps;
    EXPECT_TRUE(WaitUntil([&] { return signals_->laps > laps + 2 || signals_->errors > 0; }))
        << "the program does not go on";
    signals_->go = 1;
    ExpectGoodEnd(pid);
  }

  // At another moment each time, from before the first to after the last step of the remap.
  static void WaitForMoment(std::mt19937& random) {
    SleepFor(Nanos(static_cast<int64_t>(random() % 40'000) * 1000));
  }

  // The workers are the agents whose parent is an agent.
  std::vector<Pid> Workers() {
    const std::vector<Pid> agents = FindProcesses("unmoor-agent");
    std::vector<Pid> workers;
    for (const Pid pid : agents) {
      const auto process = ReadProcess(pid);
      if (process && std::ranges::find(agents, process->parent) != agents.end()) {
        workers.push_back(pid);
      }
    }
    return workers;
  }
};

constexpr int kRounds = 6;

TEST_F(FaultsTest, AKilledHelperOrWorkerIsReplacedAndTheRemapCompletes) {
  const PageImage image = MakePageImage(directory_, 8192);
  std::mt19937 random(1);
  for (int round = 0; round < kRounds; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Pid pid = StartWorkingSubject(image);
    for (const Pid worker : Workers()) (void)SendSignal(worker, SIGUSR1);  // remap now
    WaitForMoment(random);
    const bool helper = round % 2 == 0;
    if (helper) {
      for (const Pid victim : FindProcesses("unmoor-helper")) (void)SendSignal(victim, SIGKILL);
    } else {
      KillUnlessBorrowing(pid, Workers());
    }
    ExpectCompletes(pid);
    EXPECT_TRUE(WaitUntil([&] { return FindProcesses("unmoor-agent").empty(); }));
    if (HasFailure()) return;
  }
}

// As when the worker was killed between reading the event and answering it.
TEST_F(FaultsTest, WhatWasShortenedBeforeTheWorkerCameGrowsIntoZeros) {
  const PageImage image = MakeLayer(directory_, 512);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    memory.Shorten(200);
    ::raise(SIGSTOP);
    signals_->ready = 1;
    while (signals_->go == 0) SleepFor(Nanos(200'000));
    memory.GrowAgain(200);
    signals_->ready = 2;
  });
  AgentOptions watch;
  watch.remap = false;
  WatchStopped(pid, watch);
  AwaitReady(1);
  const std::vector<Pid> killed = Workers();
  KillUnlessBorrowing(pid, killed);
  EXPECT_TRUE(WaitUntil([&] {
    const std::vector<Pid> now = Workers();
    return now.size() == 1 && now != killed && IsInside(pid);
  }));
  signals_->go = 1;
  AwaitReady(2);
  ExpectGoodEnd(pid);
}

TEST_F(FaultsTest, AKilledSupervisorHarmsNothing) {
  const PageImage image = MakePageImage(directory_, 8192);
  std::mt19937 random(2);
  for (int round = 0; round < kRounds; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Pid pid = StartWorkingSubject(image);
    const auto workers = Workers();
    for (const Pid worker : workers) (void)SendSignal(worker, SIGUSR1);
    WaitForMoment(random);
    for (const Pid agent : FindProcesses("unmoor-agent")) {
      if (std::ranges::find(workers, agent) == workers.end()) (void)SendSignal(agent, SIGKILL);
    }
    ExpectCompletes(pid);
  }
}

// Nobody holds the userfaultfd any more, so memory given back from then on shows the image again
// (docs/guarantees.md): these programs only write.
TEST_F(FaultsTest, WithEverythingKilledTheNextRemapCompletes) {
  const PageImage image = MakePageImage(directory_, 8192);
  std::mt19937 random(3);
  for (int round = 0; round < kRounds; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    signals_->go = signals_->ready = 0;
    signals_->laps = 0;
    const Pid pid = StartSubject([&] {
      Memory memory(image, *signals_);
      std::vector<std::thread> threads;
      for (uint64_t t = 0; t < 2; ++t) {
        threads.emplace_back([&, t] {
          while (signals_->go == 0) memory.Lap(t, 2, false);
        });
      }
      signals_->ready = 1;
      for (std::thread& thread : threads) thread.join();
      memory.CheckAll("at the end");
    });
    AwaitReady(1);
    const Pid command = StartRemap(pid, {});
    WaitForMoment(random);
    KillAgents(pid);
    for (const Pid helper : FindProcesses("unmoor-helper")) (void)SendSignal(helper, SIGKILL);
    KillAgents(pid);
    AwaitEnd(command);
    EXPECT_TRUE(WaitUntil([&] { return FindProcesses("unmoor-agent").empty(); }));
    ExpectCompletes(pid);
  }
}

TEST_F(FaultsTest, TheCommandsDeathDoesNotEndTheRemap) {
  const PageImage image = MakePageImage(directory_, 8192);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    signals_->ready = 1;
    while (signals_->go == 0) memory.Lap(0, 1, false);
    memory.CheckAll("at the end");
  });
  AwaitReady(1);
  const Pid command = StartRemap(pid, {});
  EXPECT_TRUE(
      WaitUntil([&] { return !FindProcesses("unmoor-helper").empty() || !MapsImages(pid); }));
  EXPECT_TRUE(SendSignal(command, SIGKILL));
  AwaitEnd(command);
  ExpectBecomesReady(pid, Nanos(60'000'000'000));
  ExpectNoTraces(pid);
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

TEST_F(FaultsTest, ACommandThatDoesNotListenHoldsNobodyUp) {
  constexpr int kForks = 400;  // more messages than a socket holds
  const PageImage image = MakePageImage(directory_, 64);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    signals_->ready = 1;
    while (signals_->go == 0) SleepFor(Nanos(200'000));
    for (int i = 0; i < kForks; ++i) {
      const pid_t child = ::fork();
      if (child == 0) ::_exit(0);
      ::waitpid(child, nullptr, 0);
    }
    signals_->ready = 2;
  });
  AwaitReady(1);
  AgentOptions options;
  options.remap = false;
  const auto supervisor = StartSupervisor({{pid, false, false}}, WithGuard(options));
  ASSERT_TRUE(supervisor) << supervisor.error().message();
  ASSERT_TRUE(WaitUntil([&] {
    const auto progress = ReadProgress(pid);
    return progress && AgentAtWork(*progress);
  }));
  signals_->go = 1;
  AwaitReady(2);
  ExpectGoodEnd(pid);
}

}  // namespace
}  // namespace unmoor::testing_agent
