// See supervisor.h.
#include "agent/supervisor.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <deque>
#include <list>

#include "agent/progress_file.h"
#include "agent/worker.h"
#include "base/log.h"
#include "os/daemon.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/socket.h"

namespace unmoor {
namespace {

constexpr int kRestarts = 8;
constexpr Nanos kFirstMoments(20'000'000);
constexpr Nanos kRetry(5'000'000'000);
constexpr Nanos kLookAgain(20'000'000);
constexpr Nanos kLastWords(5'000'000'000);

AgentMessage MakeMessage(AgentMessage::Kind kind, Pid pid, std::string_view text = {}) {
  AgentMessage message;
  message.kind = kind;
  message.pid = pid.value;
  text.copy(message.text, sizeof(message.text) - 1);
  return message;
}

// --- in the worker process
// ------------------------------------------------------------------------

struct WorkerTask {
  SupervisorTask task;
  bool forked = false;  // a child born while its parent was direct-mapped
};

class WorkerProcess {
 public:
  WorkerProcess(const WorkerTask& task, const AgentOptions& options, Fd socket)
      : task_(task),
        options_(options),
        socket_(std::move(socket)),
        worker_(task.task.pid, options, [this](Pid child, Fd uffd) {
          Post(MakeMessage(AgentMessage::Kind::kForked, child), uffd.get());
        }) {}

  Result<> Run(Fd old_uffd) {
    guarded_ = old_uffd.valid();
    UNMOOR_ASSIGN(const bool direct_mapped, worker_.Begin(std::move(old_uffd)));
    guarded_ = true;
    if (direct_mapped && options_.eager) UNMOOR_TRY(worker_.Run());
    Post(MakeMessage(AgentMessage::Kind::kGuarded, task_.task.pid), worker_.uffd());
    if (task_.task.stopped) UNMOOR_TRY(ResumeWhenTold());
    if (!direct_mapped) return Finish();
    // The program's first moments, and the end of the command that restored it, come first.
    if (task_.task.stopped) UNMOOR_TRY(worker_.Watch(kFirstMoments, RemapAsked));
    if (task_.forked && options_.remap) {
      UNMOOR_TRY(worker_.Watch(options_.child_delay, RemapAsked));
    } else if (!options_.remap) {
      UNMOOR_TRY(worker_.Watch(Nanos(-1), RemapAsked));
    }
    UNMOOR_TRY(RemapWhenPossible());
    UNMOOR_TRY(worker_.End());
    return Finish();
  }

  void Fail(const Error& error) {
    spdlog::warn("process {}: {}", task_.task.pid.value, error.message());
    if (worker_.program_ended()) {
      (void)Finish();
    } else if (!CallsForAnother(error)) {
      Post(MakeMessage(AgentMessage::Kind::kFailed, task_.task.pid, error.message()), -1);
    }
  }

 private:
  // The helper died, or the program could not be stopped this time: the supervisor starts another
  // worker, and until then nothing that was watched is let go.
  bool CallsForAnother(const Error& error) const {
    return error.errnum() == EPIPE || (error.errnum() == EAGAIN && guarded_);
  }

  // Where the remap cannot go on (memory that must not move just now, none left for staging), the
  // program is watched, so that its memory goes on behaving, and the remap is tried again.
  Result<> RemapWhenPossible() {
    for (;;) {
      const auto done = worker_.Run();
      if (done || worker_.program_ended()) return {};
      if (done.error().errnum() == EPIPE) return done;  // the helper died: begin again
      Post(MakeMessage(AgentMessage::Kind::kProblem, task_.task.pid, done.error().message()), -1);
      UNMOOR_TRY(worker_.Watch(kRetry, RemapAsked));
      if (worker_.program_ended()) return {};
    }
  }

  Result<> ResumeWhenTold() {
    UNMOOR_ASSIGN(const auto message, NextMessage(socket_.get()));
    if (!message || message->kind != AgentMessage::Kind::kResume) {
      return MachineError("told not to go on");
    }
    if (!task_.task.stay_stopped) UNMOOR_TRY(ContinueUnnoticed(task_.task.pid));
    Post(MakeMessage(AgentMessage::Kind::kRunning, task_.task.pid), -1);
    return {};
  }

  Result<> Finish() {
    AgentMessage message = MakeMessage(AgentMessage::Kind::kFinished, task_.task.pid);
    message.report = worker_.report();
    Post(message, -1);
    return {};
  }

  void Post(const AgentMessage& message, int fd) { (void)PostMessage(socket_.get(), message, fd); }
  static bool RemapAsked() { return SignalSeen(); }

  WorkerTask task_;
  AgentOptions options_;
  Fd socket_;
  bool guarded_ = false;  // the program's memory is watched, by us or by the worker before
  Worker worker_;
};

[[noreturn]] void WorkerMain(const WorkerTask& task, const AgentOptions& options, Fd socket,
                             Fd old_uffd) {
  NoticeSignal();
  WorkerProcess process(task, options, std::move(socket));
  const auto result = process.Run(std::move(old_uffd));
  if (!result) process.Fail(result.error());
  ExitProcess(result ? 0 : 1);
}

// --- in the supervisor process
// --------------------------------------------------------------------

struct Child {
  WorkerTask task;
  Pid worker;
  Fd socket;
  Fd uffd;
  bool done = false;
  int restarts = 0;
};

class Supervisor {
 public:
  Supervisor(AgentOptions options, Fd command)
      : options_(std::move(options)), command_(std::move(command)) {}

  Result<> Start(WorkerTask task, Fd uffd) {
    Child child;
    child.task = task;
    UNMOOR_TRY(Spawn(child, std::move(uffd)));
    children_.push_back(std::move(child));
    return {};
  }

  void Loop() {
    while (!children_.empty()) {
      std::vector<int> fds = {command_.get()};
      for (const Child& child : children_) fds.push_back(child.socket.get());
      const bool idle = untold_.empty() && ended_.empty();
      const auto ready = WaitAnyReadable(fds, idle ? Nanos(-1) : kLookAgain);
      if (!ready) return;
      for (const int fd : *ready) {
        if (fd == command_.get()) {
          OnCommand();
        } else {
          OnWorker(fd);
        }
      }
      children_.remove_if([](const Child& child) { return !child.socket.valid(); });
      std::erase_if(ended_, [](Pid worker) { return ReapChild(worker).has_value(); });
      TellUntold();
    }
    // Nobody waits for us any more.
    const Nanos began = MonotonicNow();
    while (!untold_.empty() && MonotonicNow() - began < kLastWords) {
      SleepFor(kLookAgain);
      TellUntold();
    }
  }

 private:
  // `uffd` stays with us too, so that its events wait whatever becomes of the worker.
  Result<> Spawn(Child& child, Fd uffd) {
    UNMOOR_ASSIGN(StreamPair pair, CreateMessagePair());
    if (uffd.valid()) {
      UNMOOR_ASSIGN(child.uffd, Duplicate(uffd.get()));
    }
    UNMOOR_ASSIGN(const Pid pid, ForkProcess());
    if (pid.value == 0) {
      // Only what this worker needs: a descriptor of another program's would outlive its worker.
      const WorkerTask task = child.task;
      child.uffd.Reset();
      children_.clear();  // `child` may be one of them
      command_.Reset();
      pair.ours.Reset();
      WorkerMain(task, options_, std::move(pair.theirs), std::move(uffd));
    }
    child.worker = pid;
    child.socket = std::move(pair.ours);
    return {};
  }

  void OnCommand() {
    const auto message = NextMessage(command_.get());
    if (!message || !*message) {
      command_.Reset();  // the command has ended; we go on
      return;
    }
    for (Child& child : children_) {
      if (child.task.task.stopped) (void)PostMessage(child.socket.get(), **message);
    }
  }

  void OnWorker(int fd) {
    const auto it = std::ranges::find_if(
        children_, [fd](const Child& child) { return child.socket.get() == fd; });
    if (it == children_.end()) return;
    Fd passed;
    const auto message = NextMessage(fd, &passed);
    if (!message || !*message) return OnWorkerEnd(*it);
    using Kind = AgentMessage::Kind;
    switch ((*message)->kind) {
      case Kind::kGuarded:
        it->uffd = std::move(passed);
        break;
      case Kind::kForked: {
        const WorkerTask task{{Pid{(*message)->pid}, false, false}, true};
        if (const auto started = Start(task, std::move(passed)); !started) {
          spdlog::error("{}", started.error().message());
        }
        return;
      }
      case Kind::kFinished:
      case Kind::kFailed:
        it->done = true;
        it->uffd.Reset();
        FinishProgress(it->task.task.pid, OwnPid(), (*message)->text);
        break;
      case Kind::kRunning:
        it->task.task.stopped = false;
        break;
      case Kind::kProblem:
        break;
      case Kind::kResume:
        return;
    }
    // What becomes of the program's children concerns no command.
    if (it->task.forked || !command_.valid()) return;
    untold_.push_back(**message);
    TellUntold();
  }

  // Never waits: a command that does not read (it may be stopped, or busy) would make the threads
  // of the program wait, whose events end only when we let go of their userfaultfd.
  void TellUntold() {
    while (!untold_.empty()) {
      const auto told = TryPostMessage(command_.get(), untold_.front());
      if (told && !*told) return;
      untold_.pop_front();
    }
  }

  void OnWorkerEnd(Child& child) {
    ended_.push_back(child.worker);  // its socket closes some moments before it can be reaped
    child.socket.Reset();
    if (child.done) return;
    if (++child.restarts > kRestarts) {
      FinishProgress(child.task.task.pid, OwnPid(), "its agent died again and again");
      return;
    }
    spdlog::warn("the worker for process {} died; starting another", child.task.task.pid.value);
    // The helper sees its worker gone and leaves; the events wait in the userfaultfd.
    Fd uffd = std::move(child.uffd);
    if (const auto spawned = Spawn(child, std::move(uffd)); !spawned) {
      spdlog::error("{}", spawned.error().message());
    }
  }

  AgentOptions options_;
  Fd command_;
  std::deque<AgentMessage> untold_;  // to the command
  std::vector<Pid> ended_;           // workers, not reaped yet
  std::list<Child> children_;
};

}  // namespace

Result<std::optional<AgentMessage>> NextMessage(int socket, Fd* passed) {
  AgentMessage message;
  UNMOOR_ASSIGN(
      ReceivedMessage received,
      ReceiveMessage(socket, std::as_writable_bytes(std::span(&message, 1)), "the agent"));
  if (received.size == 0) return std::optional<AgentMessage>();
  if (received.size != sizeof(message)) return MachineError("cannot understand the agent");
  if (passed != nullptr) *passed = std::move(received.passed);
  return std::optional<AgentMessage>(message);
}

Result<> PostMessage(int socket, const AgentMessage& message, int fd) {
  return SendMessage(socket, std::as_bytes(std::span(&message, 1)), fd, "the agent");
}

Result<bool> TryPostMessage(int socket, const AgentMessage& message) {
  return TrySendMessage(socket, std::as_bytes(std::span(&message, 1)), "the agent");
}

Result<SupervisorHandle> StartSupervisor(const std::vector<SupervisorTask>& tasks,
                                         const AgentOptions& options) {
  UNMOOR_ASSIGN(StreamPair pair, CreateMessagePair());
  UNMOOR_ASSIGN(const std::optional<Pid> daemon,
                ForkDaemon(pair.theirs.get(), options.log_file, "unmoor-agent"));
  if (daemon) {
    pair.theirs.Reset();
    return SupervisorHandle{std::move(pair.ours), *daemon};
  }
  (void)pair.ours.Release();  // closed by ForkDaemon
  if (!options.log_file.empty()) {
    spdlog::set_level(std::min(spdlog::get_level(), spdlog::level::info));
  }
  ForgetEndedProcesses();
  IgnoreSignal();  // meant for a worker that has just died
  Supervisor supervisor(options, std::move(pair.theirs));
  for (const SupervisorTask& task : tasks) {
    if (const auto started = supervisor.Start({task, false}, Fd()); !started) ExitProcess(1);
  }
  supervisor.Loop();
  ForgetEndedProcesses();  // what killed workers left there too
  ExitProcess(0);
}

}  // namespace unmoor
