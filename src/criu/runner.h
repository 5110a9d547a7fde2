// Finding criu and running it: exact descriptors, its log kept, its decisive lines in our error.
//
// criu runs in a process group of its own, so that a Ctrl-C at the terminal reaches only us. It is
// never killed for that: a criu killed in the middle of a dump may leave the program broken.
// Instead `on_interrupt` makes the dump fail (PageServer::Abort), criu thaws the program and ends
// by itself. Only a second interrupt kills criu and every process below it.
#pragma once

#include <compare>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "criu/probe_cache.h"
#include "os/spawn.h"

namespace unmoor::criu {

struct CriuVersion {
  int major = 0;
  int minor = 0;
  int sublevel = 0;
  auto operator<=>(const CriuVersion&) const = default;
};
inline constexpr CriuVersion kOldestCriu{4, 2, 0};
// "4.2.1"; "4.2" when the sublevel is 0.
[[nodiscard]] std::string ToString(CriuVersion version);
// From the output of `criu --version`.
[[nodiscard]] std::optional<CriuVersion> ParseCriuVersion(std::string_view output);

struct CriuBinary {
  std::string path;
  // Unset after VersionCheck::kOnFailure.
  std::optional<CriuVersion> version;
};

enum class VersionCheck {
  kNow,        // runs `criu --version` and refuses anything below kOldestCriu
  kOnFailure,  // costs nothing; RunCriu asks for the version when criu has failed, and says it
};

// Order: `option` (--criu), $UNMOOR_CRIU, the private prefix, PATH. The first one named decides:
// one that is named but missing or too old is an error, not passed over.
[[nodiscard]] Result<CriuBinary> FindCriu(const std::optional<std::string>& option,
                                          VersionCheck check);
// Runs `criu --version`.
[[nodiscard]] Result<CriuVersion> ReadCriuVersion(const std::string& path);

struct CriuCommand {
  std::vector<std::string> args;  // from the action on: "restore", "-D", …
  std::vector<InheritedFd> fds;
  std::string log_path;  // absolute; criu's --log-file
  InterruptFd* interrupt = nullptr;
  std::function<void()> on_interrupt;  // called once, at the first interrupt
  // Asked every few milliseconds; once it says so, and says so still while criu stands still, criu
  // is killed. For a dump that has not frozen its program yet and never will.
  std::function<bool()> is_hopeless;
};

struct CriuOutcome {
  ExitStatus status;
  bool interrupted =
      false;  // an interrupt came while criu ran (it may have succeeded all the same)
};

// criu under way. One that is not waited for to its end is killed with all that is below it.
class RunningCriu {
 public:
  // `--log-file` and `-v2` are added before `args`, so that later options win.
  [[nodiscard]] static Result<RunningCriu> Start(const CriuBinary& criu, CriuCommand command);
  RunningCriu(RunningCriu&&) noexcept = default;
  RunningCriu& operator=(RunningCriu&&) = delete;
  ~RunningCriu();

  [[nodiscard]] Pid pid() const { return child_->pid(); }
  // True once there is something to read in the pipe `fd`, false when criu ended without.
  [[nodiscard]] Result<bool> WaitFor(int fd);
  // Runs it to its end. An error when it did not exit with 0: the message holds the first of criu's
  // own error lines and the path of the whole log.
  [[nodiscard]] Result<CriuOutcome> Finish();
  // An interrupt has come meanwhile; true also where criu failed for it.
  [[nodiscard]] bool interrupted() const { return outcome_.interrupted; }

 private:
  RunningCriu(CriuBinary criu, CriuCommand command, ProbeCache cache, ChildProcess child);
  void TakeInterrupt();
  void EndIfHopeless();

  CriuBinary criu_;
  CriuCommand command_;
  ProbeCache cache_;
  std::unique_ptr<ChildProcess> child_;  // empty: it has ended and is reaped
  CriuOutcome outcome_;
};

// Start and Finish.
[[nodiscard]] Result<CriuOutcome> RunCriu(const CriuBinary& criu, const CriuCommand& command);

// criu's "Error (…)" lines of a log, the first `count`, without duplicates.
[[nodiscard]] std::vector<std::string> DecisiveLogLines(const std::string& log_path, size_t count);

}  // namespace unmoor::criu
