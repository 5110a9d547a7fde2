#include "criu/runner.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <thread>

#include "os/file.h"
#include "os/process_control.h"

namespace unmoor::criu {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

// A shell script in the place of criu.
class Runner : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = MakeTemporaryDirectory("/tmp", "unmoor-runner-test-").value();
    ::unsetenv("UNMOOR_CRIU");
    ::setenv("UNMOOR_PROBE_CACHE", "off", 1);  // it would start the scripts once more
  }
  void TearDown() override {
    ::unsetenv("UNMOOR_CRIU");
    ASSERT_TRUE(RemoveTree(root_));
  }
  std::string Script(const std::string& body, const std::string& name = "criu") {
    const std::string path = root_ + "/" + name;
    EXPECT_TRUE(WriteFile(path, "#!/bin/sh\n" + body, 0755));
    return path;
  }
  CriuCommand Command() {
    CriuCommand command;
    command.args = {"dump", "-t", "1"};
    command.log_path = root_ + "/log";
    return command;
  }
  std::string root_;
};

TEST_F(Runner, VersionsAreParsed) {
  EXPECT_EQ(ParseCriuVersion("Version: 4.2.1\n"), (CriuVersion{4, 2, 1}));
  EXPECT_EQ(ParseCriuVersion("Version: 4.2\nGitID: v4.2\n"), (CriuVersion{4, 2, 0}));
  EXPECT_EQ(ParseCriuVersion("Warn  (x): y\nVersion: 3.17.1 (gitid 0)\n"), (CriuVersion{3, 17, 1}));
  EXPECT_EQ(ParseCriuVersion("hello"), std::nullopt);
  EXPECT_EQ(ParseCriuVersion("Version: x"), std::nullopt);
  EXPECT_EQ(ToString(CriuVersion{4, 2, 1}), "4.2.1");
  EXPECT_EQ(ToString(CriuVersion{4, 3, 0}), "4.3");
}

TEST_F(Runner, OptionComesBeforeEnvironment) {
  const std::string option = Script("echo Version: 4.3", "by-option");
  const std::string environment = Script("echo Version: 4.2.1", "by-environment");
  ::setenv("UNMOOR_CRIU", environment.c_str(), 1);
  EXPECT_EQ(FindCriu(option, VersionCheck::kNow).value().path, option);
  EXPECT_EQ(FindCriu(std::nullopt, VersionCheck::kNow).value().version, (CriuVersion{4, 2, 1}));
}

TEST_F(Runner, NamedButMissingIsAnErrorThatSaysWhoNamedIt) {
  const auto option = FindCriu("/nowhere/criu", VersionCheck::kOnFailure);
  ASSERT_FALSE(option);
  EXPECT_THAT(option.error().message(), HasSubstr("/nowhere/criu, which --criu names"));
  EXPECT_EQ(option.error().kind(), ErrorKind::kUser);
  ::setenv("UNMOOR_CRIU", "/nowhere/else", 1);
  EXPECT_THAT(FindCriu(std::nullopt, VersionCheck::kNow).error().message(),
              HasSubstr("UNMOOR_CRIU names"));
}

TEST_F(Runner, TooOldIsRefusedWithWhatToDo) {
  const auto criu = FindCriu(Script("echo Version: 4.1.1"), VersionCheck::kNow);
  ASSERT_FALSE(criu);
  EXPECT_THAT(criu.error().message(), HasSubstr("is criu 4.1.1, but 4.2 or later is needed"));
  EXPECT_THAT(criu.error().message(), HasSubstr("tools/setup"));
}

TEST_F(Runner, FailureCarriesTheDecisiveLinesAndTheLogsPlace) {
  const CriuBinary criu{Script(R"(case $1 in --version) echo Version: 4.2.1; exit;; esac
log=$3
echo "(00.1) Error (criu/util.c:1): rlimit: Can't setup RLIMIT_NOFILE for self: no" >>$log
echo "(00.1) Warn  (criu/a.c:1): nothing" >>$log
echo "(00.2) 12: Error (criu/a.c:2): first" >>$log
echo "(00.2) 12: Error (criu/a.c:2): first" >>$log
echo "(00.3) Error (criu/b.c:3): second" >>$log
exit 1
)"),
                        std::nullopt};
  const auto outcome = RunCriu(criu, Command());
  ASSERT_FALSE(outcome);
  EXPECT_EQ(outcome.error().message(),
            "criu dump failed with exit code 1: Error (criu/a.c:2): first; Error (criu/b.c:3): "
            "second; its whole log: " +
                root_ + "/log");
}

TEST_F(Runner, FailureOfATooOldCriuSaysSo) {
  const CriuBinary criu{Script("case $1 in --version) echo Version: 3.17; exit;; esac; exit 1"),
                        std::nullopt};
  const auto outcome = RunCriu(criu, Command());
  ASSERT_FALSE(outcome);
  EXPECT_THAT(outcome.error().message(), HasSubstr("is criu 3.17, 4.2 or later is needed"));
}

TEST_F(Runner, WhatCriuSaysBeforeItHasALogIsKept) {
  const CriuBinary criu{Script("echo 'Error: unknown option --nonsense' >&2; exit 1"),
                        CriuVersion{4, 2, 1}};
  const auto outcome = RunCriu(criu, Command());
  ASSERT_FALSE(outcome);
  EXPECT_THAT(outcome.error().message(), HasSubstr("unknown option --nonsense"));
}

TEST_F(Runner, OptionsOfTheCallerComeLastAndDescriptorsArriveExactly) {
  const Fd file = OpenFile(root_ + "/inherited", O_RDWR | O_CREAT).value();
  CriuCommand command = Command();
  command.fds = {{file.get(), 7}};
  const CriuBinary criu{
      Script("echo \"$@\" >" + root_ + "/args; echo hi >&7; ls /proc/$$/fd >" + root_ + "/fds"),
      std::nullopt};
  const auto outcome = RunCriu(criu, command);
  ASSERT_TRUE(outcome) << outcome.error().message();
  EXPECT_EQ(ReadFile(root_ + "/args").value(), "dump --log-file " + root_ + "/log -v2 -t 1\n");
  EXPECT_EQ(ReadFile(root_ + "/inherited").value(), "hi\n");
  EXPECT_THAT(ReadFile(root_ + "/fds").value(), HasSubstr("7"));
}

TEST_F(Runner, WhatTheUserAsksOfCriuByTheEnvironmentStays) {
  const CriuBinary criu{Script("echo $CRIU_FAULT $HOME >" + root_ + "/environment"), std::nullopt};
  ::setenv("HOME", "/home", 1);
  ASSERT_TRUE(RunCriu(criu, Command()));
  EXPECT_EQ(ReadFile(root_ + "/environment").value(), "130 /home\n");
  ::setenv("CRIU_FAULT", "131", 1);
  const auto outcome = RunCriu(criu, Command());
  ::unsetenv("CRIU_FAULT");
  ASSERT_TRUE(outcome);
  EXPECT_EQ(ReadFile(root_ + "/environment").value(), "131 /home\n");
}

TEST_F(Runner, WhatCannotBeExecutedIsAnError) {
  const std::string text = root_ + "/text";
  ASSERT_TRUE(WriteFile(text, "text"));
  const auto denied = RunCriu({text, CriuVersion{4, 2, 1}}, Command());
  ASSERT_FALSE(denied);
  EXPECT_THAT(denied.error().message(), HasSubstr("cannot run " + text + ": Permission denied"));
  const auto missing = RunCriu({root_ + "/nothing", std::nullopt}, Command());
  ASSERT_FALSE(missing);
  EXPECT_THAT(missing.error().message(), HasSubstr("No such file or directory"));
}

TEST_F(Runner, AnInterruptIsPassedOnAndCriuEndsByItself) {
  InterruptFd interrupt = InterruptFd::Create().value();
  CriuCommand command = Command();
  command.interrupt = &interrupt;
  int calls = 0;
  const std::string flag = root_ + "/flag";
  command.on_interrupt = [&] {
    ++calls;
    EXPECT_TRUE(WriteFile(flag, ""));
  };
  const CriuBinary criu{
      Script("echo up >" + root_ + "/up; while [ ! -e " + flag + " ]; do sleep 0.02; done; exit 1"),
      CriuVersion{4, 2, 1}};
  std::thread sender([&] {
    while (!Exists(root_ + "/up")) SleepFor(Nanos(5'000'000));
    ::kill(::getpid(), SIGTERM);  // SIGINT may be ignored, as in a shell's background
  });
  const auto outcome = RunCriu(criu, command);
  sender.join();
  EXPECT_EQ(calls, 1);
  ASSERT_FALSE(outcome);
  EXPECT_THAT(outcome.error().message(), HasSubstr("exit code 1"));
  EXPECT_THAT(outcome.error().message(), Not(HasSubstr("signal")));
}

TEST_F(Runner, ASecondInterruptKillsCriu) {
  InterruptFd interrupt = InterruptFd::Create().value();
  CriuCommand command = Command();
  command.interrupt = &interrupt;
  command.on_interrupt = [] { ::kill(::getpid(), SIGHUP); };
  const CriuBinary criu{Script("exec sleep 100"), CriuVersion{4, 2, 1}};
  std::thread sender([&] {
    SleepFor(Nanos(200'000'000));
    ::kill(::getpid(), SIGTERM);  // SIGINT may be ignored, as in a shell's background
  });
  const auto outcome = RunCriu(criu, command);
  sender.join();
  ASSERT_FALSE(outcome);
  EXPECT_THAT(outcome.error().message(), HasSubstr("was killed by signal 9"));
}

TEST_F(Runner, LogLinesAreCappedAndUnique) {
  const std::string log = root_ + "/log";
  ASSERT_TRUE(WriteFile(log, "Error (a): 1\nError (a): 1\nError (b): 2\nError (c): 3\n"));
  EXPECT_THAT(DecisiveLogLines(log, 2), ElementsAre("Error (a): 1", "Error (b): 2"));
  EXPECT_TRUE(DecisiveLogLines(root_ + "/nothing", 2).empty());
}

}  // namespace
}  // namespace unmoor::criu
