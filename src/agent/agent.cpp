// See agent.h.
#include "agent/agent.h"

#include <algorithm>
#include <csignal>
#include <optional>

#include "agent/progress_file.h"
#include "agent/supervisor.h"
#include "os/daemon.h"
#include "os/process_control.h"

namespace unmoor {
namespace {

// Waits for one message of `kind` from each of `count` tasks.
Result<> Expect(int socket, AgentMessage::Kind kind, size_t count) {
  while (count > 0) {
    UNMOOR_ASSIGN(const auto message, NextMessage(socket));
    if (!message) return MachineError("the agent ended before the program ran");
    if (message->kind == AgentMessage::Kind::kFailed) {
      return MachineError("process {}: {}", message->pid, message->text);
    }
    if (message->kind == kind) --count;
  }
  return {};
}

// Somebody else's agent at work on `pid`: asks it to remap (it may only be watching) and waits;
// asks again when its worker was replaced by another. Nothing when no agent is at work any more.
Result<std::optional<RemapReport>> FollowAgent(
    Pid pid, const std::function<void(const RemapReport&)>& progress) {
  constexpr Nanos kGone(2'000'000'000);  // a supervisor replaces a worker much sooner
  Pid asked;
  Nanos seen = MonotonicNow();
  for (;;) {
    UNMOOR_ASSIGN(const ProcessStatus status, QueryStatus(pid));
    if (progress && status.progress) progress(*status.progress);
    if (status.status == Status::kNever) return MachineError("{}", status.reason);
    if (status.status == Status::kReady) {
      return std::optional(status.progress.value_or(RemapReport{}));
    }
    if (status.agent) seen = MonotonicNow();
    if (status.agent && *status.agent != asked) {
      asked = *status.agent;
      (void)SendSignal(asked, SIGUSR1);
    }
    if (MonotonicNow() - seen > kGone) return std::optional<RemapReport>();
    SleepFor(Nanos(20'000'000));
  }
}

}  // namespace

Result<Pid> StartAgentForStopped(const std::vector<Pid>& tasks,
                                 const std::vector<Pid>& stay_stopped,
                                 const AgentOptions& options) {
  std::vector<SupervisorTask> supervised;
  for (const Pid pid : tasks) {
    const bool stays = std::ranges::find(stay_stopped, pid) != stay_stopped.end();
    supervised.push_back({pid, true, stays});
  }
  UNMOOR_ASSIGN(const SupervisorHandle supervisor, StartSupervisor(supervised, options));
  const int socket = supervisor.socket.get();
  UNMOOR_TRY(Expect(socket, AgentMessage::Kind::kGuarded, tasks.size()));
  AgentMessage resume;
  resume.kind = AgentMessage::Kind::kResume;
  UNMOOR_TRY(PostMessage(socket, resume));
  UNMOOR_TRY(Expect(socket, AgentMessage::Kind::kRunning, tasks.size()));
  return supervisor.pid;
}

Result<RemapReport> RemapProcess(Pid pid, const AgentOptions& options,
                                 const std::function<void(const RemapReport&)>& progress) {
  UNMOOR_ASSIGN(const ProcessStatus status, QueryStatus(pid));
  if (status.status == Status::kNever) return UserError("{}", status.reason);
  if (status.agent) {
    UNMOOR_ASSIGN(const auto report, FollowAgent(pid, progress));
    if (report) return *report;
  }
  UNMOOR_ASSIGN(SupervisorHandle supervisor, StartSupervisor({{pid, false, false}}, options));
  const int socket = supervisor.socket.get();
  for (;;) {
    UNMOOR_ASSIGN(const auto ready, WaitAnyReadable({socket}, Nanos(100'000'000)));
    if (ready.empty()) {
      if (const auto file = ReadProgress(pid); file && progress) progress(file->report);
      continue;
    }
    UNMOOR_ASSIGN(const auto message, NextMessage(socket));
    if (!message) return MachineError("the agent ended without a word");
    if (message->pid != pid.value) continue;
    if (message->kind == AgentMessage::Kind::kFailed) {
      // Perhaps an agent was there already, just replacing its worker. From ours nothing more
      // comes.
      supervisor.socket.Reset();
      const auto now = QueryStatus(pid);
      if (now && now->agent) {
        UNMOOR_ASSIGN(const auto report, FollowAgent(pid, progress));
        if (report) return *report;
      }
      return MachineError("{}", message->text);
    }
    if (message->kind == AgentMessage::Kind::kProblem) {
      return MachineError("{}; the agent stays and tries again", message->text);
    }
    if (message->kind == AgentMessage::Kind::kFinished) {
      if (progress) progress(message->report);
      return message->report;
    }
  }
}

}  // namespace unmoor
