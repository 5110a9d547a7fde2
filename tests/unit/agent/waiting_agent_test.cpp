// The agent that is started before its program: what is left when the program does not come to run.
#include <unistd.h>

#include <csignal>

#include "agent_fixture.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/ptrace.h"

namespace unmoor::testing_agent {
namespace {

class WaitingAgentTest : public AgentTest {
 protected:
  // A program as criu leaves it: stopped before its first instruction.
  Pid StartRestored(const PageImage& image) {
    const Pid pid = StartSubject([this, &image] {
      Memory memory(image, *signals_);
      ::raise(SIGSTOP);
      memory.CheckAll("once it runs");
    });
    EXPECT_TRUE(WaitUntil([&] { return StateOf(pid) == 'T'; }));
    return pid;
  }

  static char StateOf(Pid pid) {
    const auto process = ReadProcess(pid);
    return process ? process->state : '?';
  }

  WaitingAgent Begin(size_t tasks, const std::string& view = "") {
    auto agent = WaitingAgent::Begin(WithGuard({}), view);
    EXPECT_TRUE(agent) << agent.error().message();
    EXPECT_TRUE(agent->Started());
    EXPECT_TRUE(agent->Expect(tasks));
    return *std::move(agent);
  }
};

TEST_F(WaitingAgentTest, LetsEveryTaskRunThatItWasToldOf) {
  const PageImage image = MakePageImage(directory_, 64);
  std::vector<Pid> tasks;
  for (int i = 0; i < 3; ++i) tasks.push_back(StartRestored(image));
  WaitingAgent agent = Begin(2);  // fewer than come
  ASSERT_TRUE(agent.Adopt(tasks, {}));
  ASSERT_TRUE(agent.LetRun());
  const auto runs = agent.AwaitRunning();
  ASSERT_TRUE(runs) << runs.error().message();
  for (const Pid pid : tasks) ExpectGoodEnd(pid);
}

// Where SIGSTOP came to a thread that is traced, the others would run unwatched.
TEST_F(WaitingAgentTest, NothingIsDoneToATaskBeforeItHasStopped) {
  const PageImage image = MakePageImage(directory_, 64);
  const Pid task = StartSubject([&] {
    Memory memory(image, *signals_);
    signals_->ready = 1;
    while (signals_->go == 0) ++signals_->laps;
    memory.CheckAll("once it runs");
  });
  AwaitReady(1);
  WaitingAgent agent = Begin(1);
  ASSERT_TRUE(agent.Adopt({task}, {}));
  ASSERT_TRUE(agent.LetRun());
  for (int look = 0; look < 200; ++look) {
    const auto process = ReadProcess(task);
    ASSERT_TRUE(process);
    EXPECT_EQ(process->tracer, Pid{});
    SleepFor(Nanos(1'000'000));
  }
  EXPECT_TRUE(FindProcesses("unmoor-helper").empty());
  ASSERT_TRUE(SendSignal(task, SIGSTOP));
  const auto runs = agent.AwaitRunning();
  ASSERT_TRUE(runs) << runs.error().message();
  signals_->go = 1;
  ExpectGoodEnd(task);
}

TEST_F(WaitingAgentTest, OneTaskThatCannotBeGuardedLeavesNoAgentAndNothingRunning) {
  const PageImage image = MakePageImage(directory_, 64);
  const std::vector<Pid> tasks = {StartRestored(image), StartRestored(image)};
  auto traced = StoppedThread::Seize(tasks[1]);  // as a debugger would
  ASSERT_TRUE(traced);
  {
    WaitingAgent agent = Begin(2);
    ASSERT_TRUE(agent.Adopt(tasks, {}));
    ASSERT_TRUE(agent.LetRun());
    const auto runs = agent.AwaitRunning();
    ASSERT_FALSE(runs);
    EXPECT_NE(runs.error().message().find(std::to_string(tasks[1].value)), std::string::npos)
        << runs.error().message();
  }
  EXPECT_TRUE(WaitUntil([&] { return FindProcesses("unmoor-agent").empty(); }));
  EXPECT_TRUE(WaitUntil([&] { return StateOf(tasks[0]) == 'T'; })) << StateOf(tasks[0]);
  traced->Detach();
  for (const Pid pid : tasks) {
    ASSERT_TRUE(SendSignal(pid, SIGKILL));
    EXPECT_EQ(AwaitEnd(pid), SIGKILL);
  }
}

TEST_F(WaitingAgentTest, NotNeededItEnds) {
  {
    const WaitingAgent agent = Begin(4);
  }
  EXPECT_TRUE(WaitUntil([&] { return FindProcesses("unmoor-agent").empty(); }));
}

// kill -9 of `unmoor restore`: criu at work, what is below it, tasks that are there already, the
// view.
TEST_F(WaitingAgentTest, EndsWhatWasRestoredWhenItsMakerIsKilled) {
  const PageImage image = MakePageImage(directory_, 64);
  const Pid task = StartRestored(image);
  const std::string view = directory_ + "/view";
  ASSERT_TRUE(MakeDirectory(view, 0700));
  ASSERT_TRUE(WriteFile(view + "/some.img", "x"));
  const Pid criu = StartSubject([] {
    (void)::fork();
    for (;;) ::pause();
  });
  ASSERT_TRUE(WaitUntil([&] { return ReadTree(criu).value().size() == 2; }));
  const std::vector<Pid> below = ReadTree(criu).value();
  const Pid command = StartSubject([&] {
    WaitingAgent agent = Begin(1, view);
    signals_->errors += agent.Guard(criu) && agent.Adopt({task}, {}) ? 0 : 1;
    signals_->ready = 1;
    for (;;) ::pause();
  });
  AwaitReady(1);
  ASSERT_TRUE(SendSignal(command, SIGKILL));
  EXPECT_EQ(AwaitEnd(command), SIGKILL);
  EXPECT_EQ(AwaitEnd(criu), SIGKILL);
  EXPECT_EQ(AwaitEnd(below[1]), SIGKILL);
  EXPECT_EQ(AwaitEnd(task), SIGKILL);
  EXPECT_TRUE(WaitUntil([&] { return !Exists(view); }));
}

}  // namespace
}  // namespace unmoor::testing_agent
