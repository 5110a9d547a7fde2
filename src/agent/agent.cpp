// See agent.h.
#include "agent/agent.h"

#include <algorithm>
#include <csignal>
#include <optional>
#include <set>

#include "agent/lazy_server.h"
#include "agent/progress_file.h"
#include "agent/put_back.h"
#include "agent/supervisor.h"
#include "os/daemon.h"
#include "os/file.h"
#include "os/process_control.h"

namespace unmoor {
namespace {

constexpr Nanos kStandDownPatience(6'000'000'000);

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
    if (status.status == Status::kNever) return UserError("{}", status.reason);
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

// A child forked while its parent's memory was brought has its own brought soon. By another's
// userfaultfd it may never be.
Result<RemapReport> AwaitLazy(Pid pid) {
  constexpr Nanos kPatience(60'000'000'000);
  UNMOOR_ASSIGN(const ProcessStatus status, WaitReady(pid, kPatience, {}));
  if (status.status == Status::kReady) return RemapReport{};
  return MachineError("process {}: {}", pid.value, status.reason);
}

}  // namespace

WaitingAgent::WaitingAgent(Fd socket, StartingDaemon process)
    : socket_(std::move(socket)), process_(std::make_unique<StartingDaemon>(std::move(process))) {}

WaitingAgent::~WaitingAgent() {
  if (!socket_.valid()) return;
  AgentMessage message;
  message.kind = AgentMessage::Kind::kStandDown;
  if (!PostMessage(socket_.get(), message)) return;
  const Nanos began = MonotonicNow();
  while (MonotonicNow() - began < kStandDownPatience) {
    const auto readable = WaitReadable(socket_.get(), kStandDownPatience);
    if (!readable || !*readable) return;
    const auto last = NextMessage(socket_.get());
    if (!last || !*last) return;
  }
}

bool MayUseHugePages(ThpPolicy policy) {
  if (policy == ThpPolicy::kNever) return false;
  const auto enabled = ReadFile("/sys/kernel/mm/transparent_hugepage/enabled");
  return !enabled || enabled->find("[never]") == std::string::npos;
}

Result<WaitingAgent> WaitingAgent::Begin(const AgentOptions& options, const std::string& view) {
  UNMOOR_ASSIGN(SupervisorHandle supervisor, StartSupervisor({}, options, view));
  return WaitingAgent(std::move(supervisor.socket), std::move(supervisor.process));
}

Result<WaitingAgent> WaitingAgent::BeginLazy(const LazyImage& image, const AgentOptions& options,
                                             const std::string& view) {
  UNMOOR_ASSIGN(SupervisorHandle server, StartLazyServer(image, options, view));
  return WaitingAgent(std::move(server.socket), std::move(server.process));
}

Result<> WaitingAgent::Started() {
  UNMOOR_ASSIGN(pid_, process_->Wait());
  return {};
}

Result<> WaitingAgent::Guard(Pid criu) {
  AgentMessage message;
  message.kind = AgentMessage::Kind::kRestoring;
  message.pid = criu.value;
  return PostMessage(socket_.get(), message);
}

Result<> WaitingAgent::Expect(size_t tasks, int listener) {
  AgentMessage message;
  message.kind = AgentMessage::Kind::kExpect;
  message.tasks = tasks;
  return PostMessage(socket_.get(), message, listener);
}

Result<> WaitingAgent::Adopt(const std::vector<Pid>& tasks, const std::vector<Pid>& stay_stopped) {
  tasks_ = tasks;
  for (const Pid pid : tasks) {
    AgentMessage message;
    message.kind = AgentMessage::Kind::kAdopt;
    message.pid = pid.value;
    message.stay_stopped = std::ranges::find(stay_stopped, pid) != stay_stopped.end();
    UNMOOR_TRY(PostMessage(socket_.get(), message));
  }
  return {};
}

Result<> WaitingAgent::LetRun() {
  AgentMessage resume;
  resume.kind = AgentMessage::Kind::kResume;
  return PostMessage(socket_.get(), resume);
}

Result<Pid> WaitingAgent::AwaitRunning() {
  std::set<int> missing;
  for (const Pid pid : tasks_) missing.insert(pid.value);
  while (!missing.empty()) {
    UNMOOR_ASSIGN(const auto message, NextMessage(socket_.get()));
    if (!message) return MachineError("the agent ended before the program ran");
    if (message->kind == AgentMessage::Kind::kFailed) {
      return MachineError("process {}: {}", message->pid, message->text);
    }
    if (message->kind == AgentMessage::Kind::kFinished && missing.contains(message->pid)) {
      return MachineError("process {} ended before it ran", message->pid);
    }
    if (message->kind == AgentMessage::Kind::kRunning) missing.erase(message->pid);
  }
  socket_.Reset();
  return pid_;
}

Result<> PutBack(const std::vector<PutBackTask>& tasks, const AgentOptions& options) {
  std::vector<SupervisorTask> programs;
  std::set<int> missing;
  for (const PutBackTask& task : tasks) {
    programs.push_back({task.pid, false, false, task.ranges});
    missing.insert(task.pid.value);
  }
  UNMOOR_ASSIGN(SupervisorHandle supervisor, StartSupervisor(programs, options));
  UNMOOR_TRY(supervisor.process.Wait());
  while (!missing.empty()) {
    UNMOOR_ASSIGN(const auto message, NextMessage(supervisor.socket.get()));
    if (!message) return MachineError("the agent ended without a word");
    using Kind = AgentMessage::Kind;
    if (message->kind == Kind::kFailed || message->kind == Kind::kProblem) {
      return MachineError("process {}: {}", message->pid, message->text);
    }
    if (message->kind == Kind::kGuarded || message->kind == Kind::kFinished) {
      missing.erase(message->pid);
    }
  }
  return {};
}

std::optional<std::string> WaitingAgent::WhatFailed() {
  while (WaitReadable(socket_.get(), Nanos(0)).value_or(false)) {
    const auto message = NextMessage(socket_.get());
    if (!message || !*message) return std::nullopt;
    if ((*message)->kind == AgentMessage::Kind::kFailed) return (*message)->text;
  }
  return std::nullopt;
}

Result<RemapReport> RemapProcess(Pid pid, const AgentOptions& options,
                                 const std::function<void(const RemapReport&)>& progress) {
  UNMOOR_ASSIGN(const ProcessStatus status, QueryStatus(pid));
  if (status.status == Status::kNever) return UserError("{}", status.reason);
  if (status.agent) {
    UNMOOR_ASSIGN(const auto report, FollowAgent(pid, progress));
    if (report) return *report;
  }
  if (status.lazy.value != 0) return AwaitLazy(pid);
  UNMOOR_ASSIGN(SupervisorHandle supervisor, StartSupervisor({{pid, false, false}}, options));
  UNMOOR_TRY(supervisor.process.Wait());
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
      const auto now = QueryStatus(pid);
      if (now && now->status == Status::kNever) return UserError("{}", now->reason);
      return MachineError("{}; the agent stays and tries again", message->text);
    }
    if (message->kind == AgentMessage::Kind::kFinished) {
      if (progress) progress(message->report);
      return message->report;
    }
  }
}

}  // namespace unmoor
