// See runner.h.
#include "criu/runner.h"

#include <fcntl.h>

#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdlib>

#include "base/log.h"
#include "os/daemon.h"
#include "os/file.h"
#include "os/pipe.h"
#include "os/process_control.h"
#include "os/process_tree.h"
#include "os/procfs.h"

namespace unmoor::criu {
namespace {

constexpr Nanos kLookForHope(5'000'000);
constexpr Nanos kStopPatience(1'000'000'000);
constexpr std::string_view kSetupHint =
    "run tools/setup, or name another with --criu or UNMOOR_CRIU";

std::string Environment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

// The private prefix holds criu with libraries of its own behind a shell wrapper. Starting its
// loader directly saves the shell's 0.8 ms on each run.
std::vector<std::string> CommandPrefix(const std::string& path) {
  const std::string directory = path.substr(0, path.rfind('/') + 1);
  const std::string loader = directory + "usr/lib64/ld-linux-x86-64.so.2";
  const std::string binary = directory + "usr/sbin/criu";
  if (!directory.empty() && Exists(loader) && Exists(binary)) {
    return {loader, "--library-path", directory + "usr/lib/x86_64-linux-gnu", binary};
  }
  return {path};
}

// To stop a task where criu's code in it ends, criu sets a hardware breakpoint. To the kernel that
// is a performance event: the first one in a second waits for all of RCU (10 ms and more), in a
// dump with everybody frozen. Where a machine has no breakpoints criu goes there by system calls, a
// few for each task; this asks for the same. (criu's fault-injection.h, FI_NO_BREAKPOINTS; the
// kernel's kernel/events/core.c, account_event.) What the user has set stays.
std::vector<std::string> WithoutBreakpoints() {
  if (!Environment("CRIU_FAULT").empty()) return {};
  return {"CRIU_FAULT=130"};
}

std::optional<std::string> SearchPath(const std::string& name) {
  const std::string path = Environment("PATH");
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find(':', begin), path.size());
    const std::string candidate = path.substr(begin, end - begin) + "/" + name;
    if (candidate.starts_with('/') && Exists(candidate)) return candidate;
    begin = end + 1;
  }
  return std::nullopt;
}

Result<std::string> Locate(const std::optional<std::string>& option) {
  const auto named = [](const std::string& value, std::string_view by) -> Result<std::string> {
    if (value.find('/') != std::string::npos) {
      if (Exists(value)) return value;
    } else if (auto found = SearchPath(value)) {
      return *found;
    }
    return UserError("there is no criu at {}, which {} names; {}", value, by, kSetupHint);
  };
  if (option) return named(*option, "--criu");
  if (const std::string value = Environment("UNMOOR_CRIU"); !value.empty()) {
    return named(value, "UNMOOR_CRIU");
  }
  if (Exists(UNMOOR_PRIVATE_CRIU)) return UNMOOR_PRIVATE_CRIU;
  if (auto found = SearchPath("criu")) return *found;
  return UserError("there is no criu on this machine; {}", kSetupHint);
}

// A log can be large (-v4); its errors are near the end.
constexpr uint64_t kLogTail = uint64_t{4} << 20;

// What criu calls an error and then does without: it tries to raise its own limit on descriptors.
constexpr std::string_view kHarmless = "rlimit: Can't setup RLIMIT_NOFILE for self";

// "(00.123456)  42: Error (criu/x.c:7): …" from "Error" on.
std::string_view ErrorPart(std::string_view line) {
  const size_t at = line.find("Error (");
  if (at == std::string_view::npos || line.find(kHarmless) != std::string_view::npos) return {};
  return line.substr(at);
}

Failure Explain(const CriuBinary& criu, const CriuCommand& command, ExitStatus status) {
  std::string message = fmt::format("criu {} ", command.args.empty() ? "" : command.args[0]);
  message += status.signal != 0 ? fmt::format("was killed by signal {}", status.signal)
                                : fmt::format("failed with exit code {}", status.code);
  const std::vector<std::string> lines = DecisiveLogLines(command.log_path, 3);
  for (size_t i = 0; i < lines.size(); ++i) message += (i == 0 ? ": " : "; ") + lines[i];
  if (!criu.version) {
    if (const Result<CriuVersion> version = ReadCriuVersion(criu.path);
        version && *version < kOldestCriu) {
      message += fmt::format("; {} is criu {}, {} or later is needed: {}", criu.path,
                             ToString(*version), ToString(kOldestCriu), kSetupHint);
    }
  }
  message += fmt::format("; its whole log: {}", command.log_path);
  return MachineError("{}", message);
}

ProbeCache InstallProbeCache(const CriuBinary& criu) {
  const std::vector<std::string> prefix = CommandPrefix(criu.path);
  return ProbeCache::Install(prefix, prefix.back());
}

bool SharesOurTerminal(const CriuCommand& command) {
  return std::ranges::any_of(command.args,
                             [](const std::string& a) { return a == "-j" || a == "--shell-job"; });
}

}  // namespace

std::string ToString(CriuVersion version) {
  std::string text = fmt::format("{}.{}", version.major, version.minor);
  if (version.sublevel != 0) text += fmt::format(".{}", version.sublevel);
  return text;
}

std::optional<CriuVersion> ParseCriuVersion(std::string_view output) {
  constexpr std::string_view kLabel = "Version:";
  const size_t label = output.find(kLabel);
  if (label == std::string_view::npos) return std::nullopt;
  output.remove_prefix(label + kLabel.size());
  output.remove_prefix(std::min(output.find_first_not_of(' '), output.size()));
  int numbers[3] = {0, 0, 0};
  int count = 0;
  const char* at = output.data();
  const char* const end = at + output.size();
  for (; count < 3; ++count) {
    const auto [next, error] = std::from_chars(at, end, numbers[count]);
    if (error != std::errc()) break;
    at = next;
    if (at == end || *at != '.') {
      ++count;
      break;
    }
    ++at;
  }
  if (count < 2) return std::nullopt;
  return CriuVersion{numbers[0], numbers[1], numbers[2]};
}

Result<CriuVersion> ReadCriuVersion(const std::string& path) {
  std::vector<std::string> argv = CommandPrefix(path);
  argv.emplace_back("--version");
  UNMOOR_ASSIGN(const CommandOutput output, RunAndCollect(argv));
  const std::optional<CriuVersion> version = ParseCriuVersion(output.text);
  if (!output.status.ok() || !version) {
    return UserError("{} --version does not answer as criu does; {}", path, kSetupHint);
  }
  return *version;
}

Result<CriuBinary> FindCriu(const std::optional<std::string>& option, VersionCheck check) {
  CriuBinary criu;
  UNMOOR_ASSIGN(criu.path, Locate(option));
  if (check == VersionCheck::kOnFailure) return criu;
  UNMOOR_ASSIGN(criu.version, ReadCriuVersion(criu.path));
  if (*criu.version < kOldestCriu) {
    return UserError("{} is criu {}, but {} or later is needed; {}", criu.path,
                     ToString(*criu.version), ToString(kOldestCriu), kSetupHint);
  }
  return criu;
}

RunningCriu::RunningCriu(CriuBinary criu, CriuCommand command, ProbeCache cache, ChildProcess child)
    : criu_(std::move(criu)),
      command_(std::move(command)),
      cache_(std::move(cache)),
      child_(std::make_unique<ChildProcess>(std::move(child))) {}

RunningCriu::~RunningCriu() {
  if (!child_) return;
  KillTree(child_->pid());
  (void)child_->Wait();
}

Result<RunningCriu> RunningCriu::Start(const CriuBinary& criu, CriuCommand command) {
  UNMOOR_CHECK(!command.args.empty() && command.log_path.starts_with('/'));
  // What criu says before it has opened its log (of a wrong option, say) goes to the same file.
  UNMOOR_ASSIGN(const Fd log,
                OpenFile(command.log_path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600));
  SpawnOptions spawn;
  spawn.argv = CommandPrefix(criu.path);
  spawn.argv.push_back(command.args[0]);
  for (const char* const option : {"--log-file", command.log_path.c_str(), "-v2"}) {
    spawn.argv.emplace_back(option);
  }
  spawn.argv.insert(spawn.argv.end(), command.args.begin() + 1, command.args.end());
  spawn.fds = command.fds;
  spawn.environment = WithoutBreakpoints();
  spawn.stdout_fd = log.get();
  spawn.stderr_fd = log.get();
  spawn.own_process_group = !SharesOurTerminal(command);
  spawn.at_once = true;
  ProbeCache cache = InstallProbeCache(criu);
  UNMOOR_ASSIGN(ChildProcess child, Spawn(spawn));
  return RunningCriu(criu, std::move(command), std::move(cache), std::move(child));
}

void RunningCriu::TakeInterrupt() {
  if (command_.interrupt->Take() == 0) return;
  if (outcome_.interrupted) {
    spdlog::warn("interrupted again: killing criu");
    KillTree(child_->pid());
    return;
  }
  outcome_.interrupted = true;
  if (command_.on_interrupt) command_.on_interrupt();
}

// A criu that has its code in the program must not be killed: a thread that comes to the end of
// that code then dies of its breakpoint. So it is stopped first and asked about once more.
void RunningCriu::EndIfHopeless() {
  if (!command_.is_hopeless || !command_.is_hopeless()) return;
  const Pid pid = child_->pid();
  if (!SendSignal(pid, SIGSTOP)) return;
  const Nanos began = MonotonicNow();
  auto state = ReadProcess(pid);
  while (state && state->state != 'T' && MonotonicNow() - began < kStopPatience) {
    SleepFor(Nanos(100'000));
    state = ReadProcess(pid);
  }
  if (state && state->state == 'T' && command_.is_hopeless()) return KillTree(pid);
  (void)SendSignal(pid, SIGCONT);
}

Result<bool> RunningCriu::WaitFor(int fd) {
  UNMOOR_CHECK(child_ != nullptr);
  const int wake = command_.interrupt == nullptr ? -1 : command_.interrupt->get();
  const Nanos patience = command_.is_hopeless ? kLookForHope : Nanos(-1);
  for (;;) {
    UNMOOR_ASSIGN(const std::vector<int> ready,
                  WaitAnyReadable({fd, child_->pidfd(), wake}, patience));
    const auto is_ready = [&](int one) { return std::ranges::find(ready, one) != ready.end(); };
    if (fd >= 0 && is_ready(fd)) {
      if (!PipeHasEnded(fd)) return true;
      fd = -1;
    }
    if (is_ready(child_->pidfd())) return false;
    if (wake >= 0 && is_ready(wake)) TakeInterrupt();
    if (ready.empty()) EndIfHopeless();
  }
}

Result<CriuOutcome> RunningCriu::Finish() {
  UNMOOR_TRY(WaitFor(-1));
  const std::unique_ptr<ChildProcess> child = std::move(child_);
  UNMOOR_ASSIGN(outcome_.status, child->Wait());
  if (!outcome_.status.ok()) return Explain(criu_, command_, outcome_.status);
  return outcome_;
}

Result<CriuOutcome> RunCriu(const CriuBinary& criu, const CriuCommand& command) {
  UNMOOR_ASSIGN(RunningCriu running, RunningCriu::Start(criu, command));
  return running.Finish();
}

std::vector<std::string> DecisiveLogLines(const std::string& log_path, size_t count) {
  std::vector<std::string> lines;
  const Result<Fd> log = OpenFile(log_path, O_RDONLY);
  if (!log) return lines;
  const Result<struct stat> info = StatFd(log->get(), log_path);
  if (!info) return lines;
  const auto size = static_cast<uint64_t>(info->st_size);
  const uint64_t begin = size > kLogTail ? size - kLogTail : 0;
  std::string text(size - begin, '\0');
  if (!ReadExactlyAt(log->get(), std::as_writable_bytes(std::span(text)), FileOffset(begin),
                     log_path)) {
    return lines;
  }
  std::string first_line;
  for (size_t at = 0; at < text.size() && lines.size() < count;) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = std::string_view(text).substr(at, end - at);
    at = end + 1;
    if (first_line.empty() && line.find(kHarmless) == std::string_view::npos) first_line = line;
    const std::string part(ErrorPart(line));
    if (!part.empty() && std::ranges::find(lines, part) == lines.end()) lines.push_back(part);
  }
  // Without any such line (a wrong option): what criu said first.
  if (lines.empty() && !first_line.empty() && count > 0) lines.push_back(first_line);
  return lines;
}

}  // namespace unmoor::criu
