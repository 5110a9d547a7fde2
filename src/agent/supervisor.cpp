// See supervisor.h.
#include "agent/supervisor.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <deque>
#include <list>
#include <utility>

#include "agent/hold_off.h"
#include "agent/progress_file.h"
#include "agent/unfinished_restore.h"
#include "agent/worker.h"
#include "base/fault_point.h"
#include "base/log.h"
#include "os/daemon.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/socket.h"

namespace unmoor {
namespace {

// As many at once; from then on there is a pause before each. One that lived so long counts anew.
constexpr int kRestarts = 8;
constexpr Nanos kRestartPause(5'000'000'000);
constexpr Nanos kLivedLong(10'000'000'000);
constexpr Nanos kFirstMoments(20'000'000);
constexpr Nanos kRetry(5'000'000'000);
constexpr Nanos kLookAgain(20'000'000);
constexpr Nanos kLastWords(5'000'000'000);
constexpr Nanos kAsideLook(5'000'000);
constexpr Nanos kAsideAgain(50'000'000);  // after coming back
constexpr Nanos kBackLimit(60'000'000'000);
constexpr Nanos kStopPatience(60'000'000'000);  // of a program without a CPU

// --- in the worker process
// ------------------------------------------------------------------------

struct WorkerTask {
  SupervisorTask task;
  bool forked = false;  // a child born while its parent was direct-mapped
  bool again = false;   // an earlier worker may have been inside
  Nanos pause = {};     // before it begins
};

class WorkerProcess {
 public:
  WorkerProcess(const WorkerTask& task, const AgentOptions& options, Fd socket)
      : task_(task), options_(options), socket_(std::move(socket)) {
    NewWorker();
  }

  Result<> Run(Fd old_uffd) {
    guarded_ = old_uffd.valid();
    UNMOOR_ASSIGN(program_, OpenPidFd(task_.task.pid));
    UNMOOR_TRY(Enter());
    if (task_.task.stopped) UNMOOR_TRY(AwaitStopped());
    if (task_.again) UNMOOR_TRY(FaultPoint("agent.begin_again"));
    const bool restored = task_.task.stopped && !task_.again;
    const bool puts_back = !task_.task.put_back.empty() && !task_.again;
    UNMOOR_ASSIGN(bool direct_mapped, restored ? worker_->BeginRestored()
                                               : worker_->Begin(std::move(old_uffd), puts_back));
    guarded_ = true;
    if (puts_back) UNMOOR_TRY(PutBack());
    Post(MakeMessage(AgentMessage::Kind::kGuarded, task_.task.pid), worker_->uffd());
    if (task_.task.stopped) {
      if (direct_mapped) worker_->Record();
      Post(MakeMessage(AgentMessage::Kind::kRecorded, task_.task.pid), -1);
      TakeShortTurns(false);
      if (direct_mapped) worker_->LearnFlags();
      UNMOOR_TRY(ResumeWhenTold());
    }
    if (!direct_mapped) return Finish();
    spdlog::info("process {} is watched; max pause {}, thp {}, guard {}", task_.task.pid.value,
                 HumanTime(options_.max_pause), options_.thp == ThpPolicy::kAuto ? "auto" : "never",
                 options_.guard == GuardPolicy::kFreeze ? "freeze" : "fault");
    for (Nanos first = task_.task.stopped ? kFirstMoments : Nanos(0); direct_mapped;
         first = Nanos(0)) {
      const auto worked = Work(first);
      if (worked) break;
      if (worked.error().errnum() != ECANCELED) return worked;
      UNMOOR_ASSIGN(direct_mapped, StandAside());
    }
    return Finish();
  }

  void Fail(const Error& error) {
    spdlog::warn("process {}: {}", task_.task.pid.value, error.message());
    if (ProgramEnded() || !ReadProcess(task_.task.pid)) {
      (void)Finish();
      return;
    }
    const bool again = CallsForAnother(error);
    if (again && (error.errnum() == EPIPE || error.errnum() == EAGAIN)) return;
    using Kind = AgentMessage::Kind;
    const Kind kind = again ? Kind::kProblem : Kind::kFailed;
    Post(MakeMessage(kind, task_.task.pid, error.message()), -1);
  }

 private:
  void NewWorker() {
    const auto on_fork = [this](Pid child, Fd uffd) {
      Post(MakeMessage(AgentMessage::Kind::kForked, child), uffd.get());
    };
    worker_.emplace(task_.task.pid, options_, on_fork,
                    worker_ ? worker_->TakeLegacy() : Worker::Legacy{});
  }

  bool ProgramEnded() const {
    return program_.valid() && WaitReadable(program_.get(), Nanos(0)).value_or(true);
  }

  // What is not put back is for the dump to read; only a dead helper calls for another worker.
  Result<> PutBack() {
    const auto done = worker_->PutBack(task_.task.put_back);
    if (done || ProgramEnded()) return {};
    if (done.error().errnum() == EPIPE) return done;
    Post(MakeMessage(AgentMessage::Kind::kProblem, task_.task.pid, done.error().message()), -1);
    return {};
  }

  // Until nobody else is inside. An agent that is only out for a dump comes back.
  Result<> Enter() {
    for (;;) {
      auto inside = Inside::TryEnter(task_.task.pid);
      if (inside && *inside) {
        inside_ = *std::move(inside);
        return {};
      }
      if (worker_->AnotherAgentIsAtWork()) {
        return AnotherAtWork(task_.task.pid);
      }
      SleepFor(kAsideLook);
      if (ProgramEnded()) return SystemError(ESRCH, "the program ended meanwhile");
      if (!inside) return Failure(inside.error());
    }
  }

  // criu's SIGSTOP may be under way still. If it came to a thread that we trace, the others would
  // run, watched by nobody, from when they are let go until that one is.
  Result<> AwaitStopped() {
    for (const Nanos began = MonotonicNow();;) {
      UNMOOR_ASSIGN(const bool stopped, IsStopped(task_.task.pid));
      if (stopped) return {};
      if (MonotonicNow() - began > kStopPatience) {
        return MachineError("a thread of process {} does not stop", task_.task.pid.value);
      }
      SleepFor(Nanos(50'000));
    }
  }

  // errnum ECANCELED: a dump asks for the program.
  Result<> Work(Nanos first_moments) {
    worker_->StopWhen([this] { return IsAsideAsked(); });
    // The program's first moments, and the end of the command that restored it, come first.
    const auto asked = [this] { return remap_asked_ || SignalSeen(); };
    if (first_moments.value > 0) UNMOOR_TRY(worker_->Watch(first_moments, asked));
    if (task_.forked && options_.remap) {
      UNMOOR_TRY(worker_->Watch(options_.child_delay, asked));
    } else if (!options_.remap) {
      UNMOOR_TRY(worker_->Watch(Nanos(-1), asked));
    }
    UNMOOR_TRY(RemapWhenPossible());
    return worker_->End();
  }

  bool IsAsideAsked() {
    const Nanos now = MonotonicNow();
    if (now < next_aside_look_) return false;
    next_aside_look_ = now + kAsideLook;
    return IsHeldOff(task_.task.pid);
  }

  // Out of the program for as long as somebody dumps it, and in again. False: it has ended, or
  // nothing of it is direct-mapped any more. The same process throughout, so that a dead supervisor
  // does not matter.
  Result<bool> StandAside() {
    const auto aside = worker_->StepAside();
    if (!aside) spdlog::debug("cannot stand aside: {}", aside.error().message());
    if (aside) {
      inside_.reset();
      while (!ProgramEnded() && IsHeldOff(task_.task.pid)) SleepFor(kAsideLook);
      if (!Enter()) return false;
    }
    next_aside_look_ = MonotonicNow() + kAsideAgain;
    const Nanos began = MonotonicNow();
    for (;;) {
      if (ProgramEnded()) return false;
      Fd uffd = worker_->TakeUffd();
      NewWorker();
      auto begun = worker_->Begin(std::move(uffd));
      // A killed criu may trace threads for a moment more.
      if (begun || MonotonicNow() - began > kBackLimit) return begun;
      spdlog::debug("not back yet: {}", begun.error().message());
      SleepFor(kLookAgain);
    }
  }

  // What is watched stays watched whatever went wrong: the supervisor starts another worker, and
  // until then the events wait. Unless somebody else watches it by now.
  bool CallsForAnother(const Error& error) const {
    return error.errnum() == EPIPE || (guarded_ && error.errnum() != EALREADY);
  }

  // Where the remap cannot go on (memory that must not move just now, none left for staging), the
  // program is watched, so that its memory goes on behaving, and the remap is tried again.
  Result<> RemapWhenPossible() {
    for (;;) {
      remap_asked_ = remap_asked_ || SignalSeen();
      ForgetSignal();  // the next one asks for another try
      const auto done = worker_->Run();
      if (done || ProgramEnded()) return {};
      const int errnum = done.error().errnum();
      if (errnum == EPIPE || errnum == ECANCELED) return done;  // the helper died: begin again
      Post(MakeMessage(AgentMessage::Kind::kProblem, task_.task.pid, done.error().message()), -1);
      UNMOOR_TRY(worker_->Watch(kRetry, SignalSeen));
      if (ProgramEnded()) return {};
    }
  }

  Result<> ResumeWhenTold() {
    UNMOOR_ASSIGN(const auto message, NextMessage(socket_.get()));
    if (!message || message->kind != AgentMessage::Kind::kResume) {
      return MachineError("told not to go on");
    }
    return {};
  }

  Result<> Finish() {
    AgentMessage message = MakeMessage(AgentMessage::Kind::kFinished, task_.task.pid);
    message.report = worker_->report();
    Post(message, -1);
    return {};
  }

  void Post(const AgentMessage& message, int fd) { (void)PostMessage(socket_.get(), message, fd); }

  WorkerTask task_;
  AgentOptions options_;
  Fd socket_;
  Fd program_;                    // its pidfd
  std::optional<Inside> inside_;  // the right to be
  bool guarded_ = false;          // the program's memory is watched, by us or by the worker before
  std::optional<Worker> worker_;
  Nanos next_aside_look_;
  bool remap_asked_ = false;
};

[[noreturn]] void WorkerMain(const WorkerTask& task, const AgentOptions& options, Fd socket,
                             Fd old_uffd) {
  NoticeSignal();
  // Readable: the supervisor has ended.
  if (task.pause.value > 0 && WaitReadable(socket.get(), task.pause).value_or(true)) ExitProcess(1);
  WorkerProcess process(task, options, std::move(socket));
  const auto result = process.Run(std::move(old_uffd));
  if (!result) process.Fail(result.error());
  ExitProcess(result ? 0 : 1);
}

// Ready before its program is: what the first moments inside take is in memory already.
[[noreturn]] void SpareMain(const AgentOptions& options, Fd socket) {
  WarmUpWorker();
  const auto message = NextMessage(socket.get());
  if (!message || !*message || (*message)->kind != AgentMessage::Kind::kAdopt) ExitProcess(0);
  const SupervisorTask task{Pid{(*message)->pid}, true, (*message)->stay_stopped};
  WorkerMain({task, false}, options, std::move(socket), Fd());
}

// --- in the supervisor process
// --------------------------------------------------------------------

struct Child {
  WorkerTask task;
  Pid worker;
  Fd socket;
  Fd uffd;
  bool done = false;
  bool spare = false;    // its worker has no task yet
  bool missing = false;  // its worker could not be started yet
  bool guarded = false;
  bool recorded = false;
  bool told_to_run = false;  // but not said to run yet
  Nanos began;               // the worker
  int restarts = 0;
  uint64_t start_time = 0;  // of the program, where its worker is missing
};

constexpr size_t kMaxSpares = 16;

class Supervisor {
 public:
  Supervisor(AgentOptions options, Fd command)
      : options_(std::move(options)), command_(std::move(command)) {}

  void AwaitTasks(std::string view) { restore_.emplace(std::move(view)); }

  Result<> Start(WorkerTask task) {
    Child child;
    child.task = task;
    UNMOOR_TRY(Spawn(child));
    children_.push_back(std::move(child));
    return {};
  }

  void Loop() {
    while (!children_.empty() || restore_ || ViewIsLeft()) {
      std::vector<int> fds = {command_.get()};
      bool idle = untold_.empty() && ended_.empty() && !(children_.empty() && done_restore_);
      for (const Child& child : children_) {
        if (child.socket.valid()) fds.push_back(child.socket.get());
        idle = idle && !child.missing;
      }
      const auto ready = WaitAnyReadable(fds, idle ? Nanos(-1) : kLookAgain);
      if (!ready) return;
      for (const int fd : *ready) {
        if (fd == command_.get()) {
          OnCommand();
        } else {
          OnWorker(fd);
        }
      }
      StartMissing();
      children_.remove_if(
          [](const Child& child) { return !child.socket.valid() && !child.missing; });
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
  // Its userfaultfd stays with us too, so that the events wait whatever becomes of the worker.
  Result<> Spawn(Child& child) {
    UNMOOR_TRY(FaultPoint("agent.start_worker"));
    UNMOOR_ASSIGN(StreamPair pair, CreateMessagePair());
    UNMOOR_ASSIGN(const Pid pid, ForkProcess());
    if (pid.value == 0) {
      // Only what this worker needs: a descriptor of another program's would outlive its worker.
      const WorkerTask task = child.task;
      const bool spare = child.spare;
      Fd uffd = std::move(child.uffd);
      children_.clear();  // `child` may be one of them
      command_.Reset();
      restore_.reset();
      pair.ours.Reset();
      if (spare) SpareMain(options_, std::move(pair.theirs));
      WorkerMain(task, options_, std::move(pair.theirs), std::move(uffd));
    }
    child.worker = pid;
    child.began = MonotonicNow();
    child.socket = std::move(pair.ours);
    child.missing = false;
    return {};
  }

  // Of a program that runs: no memory, or no process to be had, may pass. As long as we hold its
  // userfaultfd, who gives memory back waits.
  void StartLater(Child& child, const Error& error) {
    spdlog::error("no worker for process {} yet: {}", child.task.task.pid.value, error.message());
    child.missing = true;
    const auto process = ReadProcess(child.task.task.pid);
    child.start_time = process ? process->start_time : 0;
  }

  void StartMissing() {
    for (Child& child : children_) {
      if (!child.missing) continue;
      const auto process = ReadProcess(child.task.task.pid);
      if (process && child.start_time == 0) child.start_time = process->start_time;
      const bool ended = process ? process->ended() || process->start_time != child.start_time
                                 : process.error().errnum() == ENOENT;
      if (ended) child.missing = false;
      if (!ended) (void)Spawn(child);
    }
  }

  // The command removes it as soon as the program runs, unless it dies.
  bool ViewIsLeft() const {
    return done_restore_ && command_.valid() && Exists(done_restore_->view());
  }

  void OnCommand() {
    const auto message = NextMessage(command_.get());
    if (!message || !*message) {
      command_.Reset();  // the command has ended; we go on, unless the program does not run yet
      if (restore_) {
        EndRestored();
        GiveUp();
      }
      if (done_restore_) done_restore_->RemoveView();
      return;
    }
    switch ((*message)->kind) {
      case AgentMessage::Kind::kRestoring:
        if (restore_) restore_->CriuIs(Pid{(*message)->pid});
        return;
      case AgentMessage::Kind::kExpect:
        Prepare((*message)->tasks);
        return;
      case AgentMessage::Kind::kAdopt:
        Adopt(**message);
        return;
      case AgentMessage::Kind::kResume:
        may_run_ = true;
        ResumeOnceGuarded();
        return;
      case AgentMessage::Kind::kStandDown:
        GiveUp();
        return;
      default:
        return;
    }
  }

  // While criu starts, and not before: it is what everybody waits for.
  void Prepare(size_t tasks) {
    for (size_t i = 0; i < std::min(tasks, kMaxSpares); ++i) {
      Child child;
      child.spare = true;
      if (!Spawn(child)) break;
      children_.push_back(std::move(child));
    }
    ForgetEndedProcesses();
  }

  void Adopt(const AgentMessage& message) {
    const SupervisorTask task{Pid{message.pid}, true, message.stay_stopped};
    const auto spare = std::ranges::find_if(children_, &Child::spare);
    if (spare != children_.end()) {
      spare->spare = false;
      spare->task = {task, false};
      (void)PostMessage(spare->socket.get(), message);
    } else if (const auto started = Start({task, false}); !started) {
      SayThatItFailed(task.pid, started.error().message());
    }
  }

  void ResumeOnceGuarded() {
    const bool waits = std::ranges::any_of(
        children_, [](const Child& child) { return child.task.task.stopped && !child.guarded; });
    if (may_run_ && restore_ && !waits && !failed_) Resume();
  }

  void Resume() {
    const AgentMessage message = MakeMessage(AgentMessage::Kind::kResume, Pid{});
    done_restore_ = std::exchange(restore_, std::nullopt);
    TakeShortTurns(false);
    for (Child& child : children_) {
      if (child.spare) {
        ended_.push_back(child.worker);
        child.socket.Reset();  // it ends
      }
      SupervisorTask& task = child.task.task;
      if (!task.stopped) continue;
      const auto runs = task.stay_stopped ? Result<>() : ContinueUnnoticed(task.pid);
      if (!runs) SayThatItFailed(task.pid, runs.error().message());
      task.stopped = false;
      child.told_to_run = runs.has_value();
      (void)PostMessage(child.socket.get(), message);
      SayThatItRuns(child);
    }
  }

  void SayThatItFailed(Pid pid, const std::string& why) {
    failed_ = true;
    untold_.push_back(MakeMessage(AgentMessage::Kind::kFailed, pid, why));
    TellUntold();
  }

  void SayThatItRuns(Child& child) {
    if (!child.told_to_run || !child.recorded) return;
    child.told_to_run = false;
    untold_.push_back(MakeMessage(AgentMessage::Kind::kRunning, child.task.task.pid));
    TellUntold();
  }

  // The command died before the program ran: nothing of it is to stay.
  void EndRestored() {
    std::vector<Pid> stopped;
    for (const Child& child : children_) {
      if (child.task.task.stopped) stopped.push_back(child.task.task.pid);
    }
    restore_->End(stopped);
  }

  // Workers end when their sockets do; the command may wait for our own end.
  void GiveUp() {
    const Nanos began = MonotonicNow();
    for (Child& child : children_) {
      ended_.push_back(child.worker);
      child.socket.Reset();
    }
    children_.clear();
    restore_.reset();
    untold_.clear();
    while (!ended_.empty() && MonotonicNow() - began < kLastWords) {
      std::erase_if(ended_, [](Pid worker) { return ReapChild(worker).has_value(); });
      SleepFor(Nanos(1'000'000));
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
        it->guarded = true;
        if (restore_) return ResumeOnceGuarded();
        break;
      case Kind::kForked: {
        Child& born = children_.emplace_back();
        born.task = {{Pid{(*message)->pid}, false, false}, true};
        born.uffd = std::move(passed);
        if (const auto started = Spawn(born); !started) StartLater(born, started.error());
        return;
      }
      case Kind::kFinished:
      case Kind::kFailed:
        failed_ = true;
        it->done = true;
        it->uffd.Reset();
        FinishProgress(it->task.task.pid, OwnPid(), (*message)->text);
        break;
      case Kind::kRecorded:
        it->recorded = true;
        return SayThatItRuns(*it);
      case Kind::kProblem:
        break;
      default:
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
    if (child.done || child.spare) return;
    if (MonotonicNow() - child.began > kLivedLong) child.restarts = 0;
    const bool often = ++child.restarts > kRestarts;
    if (often && child.task.task.stopped) {
      const std::string why = "its agent died again and again";
      FinishProgress(child.task.task.pid, OwnPid(), why);
      SayThatItFailed(child.task.task.pid, why);
      return;
    }
    child.task.pause = often ? kRestartPause : Nanos(0);
    spdlog::warn("the worker for process {} died; starting another", child.task.task.pid.value);
    child.task.again = true;
    child.guarded = child.recorded = false;
    // The helper sees its worker gone and leaves; the events wait in the userfaultfd.
    const auto spawned = Spawn(child);
    if (spawned) return;
    if (!child.task.task.stopped) return StartLater(child, spawned.error());
    SayThatItFailed(child.task.task.pid, spawned.error().message());
  }

  AgentOptions options_;
  Fd command_;
  std::deque<AgentMessage> untold_;  // to the command
  std::vector<Pid> ended_;           // workers, not reaped yet
  std::list<Child> children_;
  std::optional<UnfinishedRestore> restore_;       // until the program runs
  bool may_run_ = false;                           // what was adopted,
  bool failed_ = false;                            // unless a task of it cannot
  std::optional<UnfinishedRestore> done_restore_;  // from then on
};

}  // namespace

AgentMessage MakeMessage(AgentMessage::Kind kind, Pid pid, std::string_view text) {
  AgentMessage message;
  message.kind = kind;
  message.pid = pid.value;
  text.copy(message.text, sizeof(message.text) - 1);
  return message;
}

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

Result<std::optional<SupervisorHandle>> ForkAgent(StreamPair& pair, std::span<const int> keep,
                                                  const AgentOptions& options) {
  UNMOOR_ASSIGN(std::optional<StartingDaemon> daemon,
                ForkDaemon(keep, options.log_file, "unmoor-agent"));
  if (daemon) {
    pair.theirs.Reset();
    return std::optional(SupervisorHandle{std::move(pair.ours), *std::move(daemon)});
  }
  (void)pair.ours.Release();  // closed by ForkDaemon
  if (!options.log_file.empty()) {
    spdlog::set_level(std::min(spdlog::get_level(), spdlog::level::info));
  }
  return std::optional<SupervisorHandle>();
}

Result<SupervisorHandle> StartSupervisor(const std::vector<SupervisorTask>& tasks,
                                         const AgentOptions& options,
                                         const std::optional<std::string>& view) {
  UNMOOR_ASSIGN(StreamPair pair, CreateMessagePair());
  UNMOOR_ASSIGN(auto handle, ForkAgent(pair, std::array{pair.theirs.get()}, options));
  if (handle) return *std::move(handle);
  AllowMoreDescriptors();      // two for each process that is forked meanwhile
  if (view) TakeShortTurns();  // until the program runs
  IgnoreSignal();              // meant for a worker that has just died
  Supervisor supervisor(options, std::move(pair.theirs));
  if (view) supervisor.AwaitTasks(*view);
  if (!view) ForgetEndedProcesses();
  for (const SupervisorTask& task : tasks) {
    if (const auto started = supervisor.Start({task, false}); !started) ExitProcess(1);
  }
  supervisor.Loop();
  ForgetEndedProcesses();  // what killed workers left there too
  ExitProcess(0);
}

}  // namespace unmoor
