// What `dump` refuses before it has touched anything: one clear line each.
#include <gmock/gmock.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "checkpoint/checkpoint.h"

namespace unmoor {
namespace {

using ::testing::HasSubstr;

std::string Refusal(Pid pid) {
  const auto result = CheckDumpable(pid);
  if (result) return "";
  EXPECT_EQ(result.error().kind(), ErrorKind::kUser);
  EXPECT_THAT(result.error().message(), ::testing::Not(HasSubstr("\n")));
  return result.error().message();
}

// A child that waits to be killed.
class Sleeper {
 public:
  Sleeper() : pid_(::fork()) {
    while (pid_ == 0) ::pause();
  }
  ~Sleeper() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  [[nodiscard]] Pid pid() const { return Pid{pid_}; }

 private:
  pid_t pid_;
};

TEST(DumpRefusal, ProgramThatRunsIsAccepted) {
  const Sleeper child;
  EXPECT_EQ(Refusal(child.pid()), "");
}

TEST(DumpRefusal, AbsentProcess) {
  EXPECT_THAT(Refusal(Pid{0x3fffff}), HasSubstr("there is no process 4194303"));
}

TEST(DumpRefusal, Zombie) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(0);
  siginfo_t info{};
  ::waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT);
  EXPECT_THAT(Refusal(Pid{child}), HasSubstr("zombie"));
  ::waitpid(child, nullptr, 0);
}

TEST(DumpRefusal, TracedProcessNamesItsTracer) {
  const Sleeper child;
  ASSERT_EQ(::ptrace(PTRACE_SEIZE, child.pid().value, 0, 0), 0);
  const auto result = CheckUntraced(child.pid(), Nanos(0));
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().kind(), ErrorKind::kUser);
  EXPECT_THAT(result.error().message(),
              HasSubstr(fmt::format("is traced by {}", static_cast<int>(::getpid()))));
  ::kill(child.pid().value, SIGKILL);
  ::waitpid(child.pid().value, nullptr, __WALL);
}

TEST(DumpRefusal, OurOwnAncestor) {
  EXPECT_THAT(Refusal(Pid{static_cast<int>(::getpid())}), HasSubstr("started this command"));
}

}  // namespace
}  // namespace unmoor
