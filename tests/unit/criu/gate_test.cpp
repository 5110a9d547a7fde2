#include "criu/gate.h"

#include <gmock/gmock.h>

#include <csignal>
#include <cstdlib>

#include "criu/runner.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor::criu {
namespace {

using ::testing::HasSubstr;

// A shell script in the place of criu; the images are in a view as `unmoor restore` makes it.
class GateTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = MakeTemporaryDirectory("/tmp", "unmoor-gate-test-").value();
    view_ = root_ + "/view";
    ASSERT_TRUE(MakeDirectory(view_, 0700));
    ASSERT_TRUE(WriteFile(root_ + "/pstree.img", "the tree"));
    ASSERT_TRUE(WriteFile(root_ + "/inventory.img", "the inventory"));
    ::setenv("UNMOOR_PROBE_CACHE", "off", 1);  // it would start the script once more
  }
  void TearDown() override { ASSERT_TRUE(RemoveTree(root_)); }

  RunningCriu Start(Gate& gate, const std::string& body) {
    const std::string path = root_ + "/criu";
    EXPECT_TRUE(WriteFile(path, "#!/bin/sh\ncd " + root_ + "\n" + body, 0755));
    CriuCommand command;
    command.args = {"restore"};
    command.fds = gate.fds();
    command.log_path = root_ + "/log";
    auto criu = RunningCriu::Start({path, CriuVersion{4, 2, 1}}, command);
    EXPECT_TRUE(criu) << criu.error().message();
    gate.CriuStarted();
    return *std::move(criu);
  }
  Gate Create() { return Gate::Create(root_, view_, 3).value(); }
  void Await(const std::string& name) {
    while (!Exists(root_ + "/" + name)) SleepFor(Nanos(2'000'000));
  }

  std::string root_;
  std::string view_;
};

TEST_F(GateTest, CriuWaitsForTheTreeAndSaysWhenItsTasksAreThere) {
  Gate gate = Create();
  RunningCriu criu = Start(gate,
                           "cat view/inventory.img >inventory; cat view/pstree.img >tree\n"
                           "echo done >view/stats-restore\n"
                           "while [ ! -e flag ]; do sleep 0.01; done\n");
  Await("tree");
  EXPECT_EQ(ReadFile(root_ + "/inventory").value(), "the inventory");
  EXPECT_EQ(ReadFile(root_ + "/tree").value(), "");
  ASSERT_TRUE(gate.Open());
  const auto restored = criu.WaitFor(gate.restored());
  ASSERT_TRUE(restored) << restored.error().message();
  EXPECT_TRUE(*restored);
  EXPECT_EQ(ReadFile(root_ + "/tree").value(), "the tree");
  ASSERT_TRUE(WriteFile(root_ + "/flag", ""));
  EXPECT_TRUE(criu.Finish());
}

TEST_F(GateTest, ClosedUnopenedCriuFindsNoTree) {
  std::optional<Gate> gate(Create());
  RunningCriu criu = Start(*gate, "cat view/pstree.img >tree; [ -s tree ] || exit 7\n");
  Await("tree");
  gate.reset();
  const auto outcome = criu.Finish();
  ASSERT_FALSE(outcome);
  EXPECT_THAT(outcome.error().message(), HasSubstr("exit code 7"));
}

TEST_F(GateTest, ACriuThatEndedIsNoErrorOfTheGate) {
  Gate gate = Create();
  RunningCriu criu = Start(gate, "exit 3\n");
  const auto restored = criu.WaitFor(gate.restored());
  ASSERT_TRUE(restored) << restored.error().message();
  EXPECT_FALSE(*restored);
  EXPECT_TRUE(gate.Open());  // and no SIGPIPE
  const auto outcome = criu.Finish();
  ASSERT_FALSE(outcome);
  EXPECT_THAT(outcome.error().message(), HasSubstr("exit code 3"));
}

TEST_F(GateTest, CriuLetGoOfIsEndedWithAllBelowIt) {
  Pid below;
  {
    Gate gate = Create();
    const RunningCriu criu = Start(gate, "sleep 1000 & echo $! >new; mv new below; wait\n");
    Await("below");
    below.value = std::atoi(ReadFile(root_ + "/below").value().c_str());
  }
  for (auto process = ReadProcess(below); process && !process->ended();
       process = ReadProcess(below)) {
    SleepFor(Nanos(2'000'000));
  }
}

}  // namespace
}  // namespace unmoor::criu
