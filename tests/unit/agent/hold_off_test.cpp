// Who may be inside a program: one at a time, whoever is killed.
#include "agent/hold_off.h"

#include <unistd.h>

#include <csignal>

#include "agent_fixture.h"
#include "os/process_control.h"
#include "os/spawn.h"

namespace unmoor::testing_agent {
namespace {

constexpr Nanos kAtOnce(0);
constexpr Nanos kLong(10'000'000'000);

class HoldOffTest : public AgentTest {
 protected:
  Pid StartSleeper() {
    return StartSubject([this] {
      while (signals_->go == 0) ::usleep(1000);
    });
  }
  void EndSleeper(Pid pid) {
    signals_->go = 1;
    ExpectGoodEnd(pid);
  }
};

TEST_F(HoldOffTest, TheAgentAndADumpAreNeverInsideTogether) {
  const Pid pid = StartSleeper();
  {
    auto agent = Inside::TryEnter(pid);
    ASSERT_TRUE(agent && *agent);
    EXPECT_FALSE(IsHeldOff(pid));
    auto dump = HoldOff::Begin(pid);
    ASSERT_TRUE(dump);
    EXPECT_TRUE(IsHeldOff(pid));
    EXPECT_FALSE(dump->Await(kAtOnce).value()) << "the agent is inside";
    agent->reset();
    EXPECT_TRUE(dump->Await(kAtOnce).value());
    EXPECT_FALSE(Inside::TryEnter(pid)->has_value()) << "the dump is inside";
  }
  EXPECT_FALSE(IsHeldOff(pid));
  EXPECT_TRUE(Inside::TryEnter(pid)->has_value());
  EndSleeper(pid);
}

TEST_F(HoldOffTest, ASecondDumpIsRefusedAndToldOfTheFirst) {
  const Pid pid = StartSleeper();
  const auto first = HoldOff::Begin(pid);
  ASSERT_TRUE(first);
  const auto second = HoldOff::Begin(pid);
  ASSERT_FALSE(second);
  EXPECT_NE(second.error().message().find(std::to_string(OwnPid().value)), std::string::npos)
      << second.error().message();
  EndSleeper(pid);
}

TEST_F(HoldOffTest, AKilledDumpFreesTheProgramOnlyWithItsCriu) {
  const Pid pid = StartSleeper();
  std::optional<ChildProcess> criu;
  {
    auto dump = HoldOff::Begin(pid);
    ASSERT_TRUE(dump && dump->Await(kAtOnce).value());
    SpawnOptions options;
    options.argv = {"sleep", "1000"};
    options.fds = {{dump->inside(), 3}};
    auto child = Spawn(options);
    ASSERT_TRUE(child);
    criu.emplace(*std::move(child));
  }
  EXPECT_FALSE(Inside::TryEnter(pid)->has_value()) << "criu is inside still";
  ASSERT_TRUE(criu->Signal(SIGKILL));
  ASSERT_TRUE(criu->Wait());
  EXPECT_TRUE(HoldOff::Begin(pid)->Await(kLong).value());
  EndSleeper(pid);
}

}  // namespace
}  // namespace unmoor::testing_agent
