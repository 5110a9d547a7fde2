// See lazy_server.h.
#include "agent/lazy_server.h"

#include <algorithm>
#include <csignal>
#include <list>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "agent/progress_file.h"
#include "agent/unfinished_restore.h"
#include "base/fault_point.h"
#include "base/log.h"
#include "image/layout.h"
#include "os/daemon.h"
#include "os/file.h"
#include "os/memory_room.h"
#include "os/process_control.h"
#include "os/process_tree.h"
#include "os/procfs.h"
#include "os/ptrace.h"
#include "os/socket.h"
#include "os/userfaultfd.h"

namespace unmoor {
namespace {

constexpr int32_t kRestoreFinished = 0x52535446;  // criu's last word: every task is there
constexpr Nanos kFirstMoments(5'000'000);         // of the program, before pages are brought
constexpr Nanos kLookAgain(100'000'000);
constexpr Nanos kSoon(1'000'000);
constexpr Nanos kLastWords(5'000'000'000);
constexpr Nanos kSaveInterval(50'000'000);
constexpr int kRoundsForFaults = 4;  // in a row, while pages are still to be brought
constexpr int kEventsInARow = 64;

// What server and keeper have in common. The descriptors belong to the table, which both have.
struct Pair {
  const LazyImage& image;
  const AgentOptions& options;
  std::string view;
  LazyJournal journal;
  int command = -1;
};

[[noreturn]] void Keep(Pair& pair, int server);

// Returns when they have ended: what they wait for becomes zeros when we end.
void EndTasks(std::span<const Pid> tasks) {
  std::vector<Fd> pidfds;
  for (const Pid task : tasks) {
    if (auto pidfd = OpenPidFd(task)) pidfds.push_back(std::move(*pidfd));
  }
  for (const Pid task : tasks) KillTree(task);
  for (const Fd& pidfd : pidfds) (void)WaitForExit(pidfd.get(), kLastWords, -1);
}

// Whether `fd` is still what it was; numbers are given again.
bool IsStill(int fd, std::string_view kind) {
  const auto target = ReadLink(fmt::format("/proc/self/fd/{}", fd));
  return target && target->starts_with(kind);
}

class LazyServer {
 public:
  explicit LazyServer(Pair& pair)
      : pair_(pair), source_(pair.image.layers), state_(pair.image), began_(MonotonicNow()) {}

  // Takes up what an earlier one has left.
  void Follow();
  // Until there is nothing left to do.
  void Run();

 private:
  using Step = AddressSpace::Step;
  using Space = LazyState::Space;

  void Record(const LazyRecord& record);
  [[nodiscard]] Result<> StartKeeper();
  [[nodiscard]] std::vector<int> Descriptors();
  [[nodiscard]] Nanos Patience();
  void OnReadable(int fd);

  void OnCommand();
  void Adopt(const AgentMessage& message);
  void Resume();
  [[nodiscard]] bool IsAllWatched();
  void TellThatItRuns();
  void GiveUp();
  void Tell(AgentMessage::Kind kind, Pid pid, const std::string& text = {});

  void OnConnection();
  void OnCriu();
  [[nodiscard]] Result<> ReceiveAll();
  [[nodiscard]] Result<> ReceiveTask();

  void OnEvents(Space& space);
  // False when none waits.
  [[nodiscard]] Result<bool> OnEvent(Space& space);

  void StepAll();
  void StepOne(Space& space);
  [[nodiscard]] bool MayBring(const Space& space) const;
  void ExpectNext();
  [[nodiscard]] bool HasRoom(Space& space);
  [[nodiscard]] bool IsOver(Space& space);
  void Close(Space& space);
  void CloseOfEnded();
  void EndProgram(const std::string& why);
  [[nodiscard]] std::optional<ProcessInfo> ProcessOf(const Space& space) const;

  void SaveProgress();
  void SaveProgress(const Space& space, bool finished, const std::string& problem);

  Pair& pair_;
  VerifiedBlocks source_;
  LazyState state_;
  std::map<int, MemoryRoom> rooms_;  // by the restored task's pid
  Nanos began_;
  Pid keeper_;
  Fd keeper_pidfd_;
  int own_pidfd_ = -1;
  Fd listener_;
  Fd criu_;
  Nanos running_since_;
  Nanos last_saved_;
  Nanos last_look_;
  bool waited_ = false;        // somebody has to wait: look again soon
  int rounds_for_faults_ = 0;  // since pages were last brought by themselves
  bool events_came_ = false;   // in this round
};

void LazyServer::Record(const LazyRecord& record) {
  pair_.journal.Append(record);
  state_.Apply(record);
}

void LazyServer::Follow() {
  for (const LazyRecord& record : pair_.journal.records()) state_.Apply(record);
  if (state_.finished()) return;
  if (!state_.running()) return EndProgram("the server of its memory died before it ran");
  if (!pair_.journal.whole()) {
    return EndProgram("the server of its memory died while it read what the program had done");
  }
  spdlog::warn("the server died; its keeper goes on");
  // What was closed is not recorded of the command's socket, and may not be of a userfaultfd.
  if (!IsStill(pair_.command, "socket:")) pair_.command = -1;
  std::vector<int> closed;
  for (Space& space : state_.spaces()) {
    const int uffd = space.memory.uffd();
    if (!IsStill(uffd, "anon_inode:[userfaultfd]")) closed.push_back(uffd);
    UffdWakeAll(uffd);
  }
  for (const int uffd : closed) Record({.kind = LazyRecord::Kind::kClosed, .uffd = uffd});
  TellThatItRuns();
}

void LazyServer::TellThatItRuns() {
  running_since_ = MonotonicNow();
  for (const LazyState::Adopted& task : state_.adopted()) {
    Tell(AgentMessage::Kind::kRunning, task.pid);
  }
}

Result<> LazyServer::StartKeeper() {
  if (own_pidfd_ < 0) {
    UNMOOR_ASSIGN(Fd own, OpenPidFd(OwnPid()));
    own_pidfd_ = own.Release();
  }
  UNMOOR_ASSIGN(keeper_, ForkSharingDescriptors());
  if (keeper_.value == 0) Keep(pair_, own_pidfd_);
  UNMOOR_ASSIGN(keeper_pidfd_, OpenPidFd(keeper_));
  return {};
}

void LazyServer::Run() {
  NoticeSignal();
  while (!state_.finished()) {
    if (!keeper_pidfd_.valid()) {
      source_.StopReaders();
      if (const auto started = StartKeeper(); !started) {
        spdlog::warn("{}; without a keeper", started.error().message());
      }
      if (const auto started = source_.StartReaders(); !started) {
        spdlog::debug("{}; nothing is read ahead", started.error().message());
      }
    }
    const auto ready = WaitAnyReadable(Descriptors(), Patience());
    if (!ready) return EndProgram(ready.error().message());
    waited_ = false;
    events_came_ = false;
    for (const int fd : *ready) {
      OnReadable(fd);
      if (state_.finished()) return;
    }
    StepAll();
    const bool save = MonotonicNow() - last_saved_ > kSaveInterval;
    if (save && !state_.finished()) SaveProgress();  // last words stay
  }
}

std::vector<int> LazyServer::Descriptors() {
  std::vector<int> fds = {pair_.command, listener_.get(), criu_.get(), keeper_pidfd_.get()};
  for (Space& space : state_.spaces()) fds.push_back(space.memory.uffd());
  return fds;
}

Nanos LazyServer::Patience() {
  if (waited_) return kSoon;
  if (!state_.running()) return Nanos(-1);
  Nanos patience = kLookAgain;
  for (Space& space : state_.spaces()) {
    if (!space.memory.brought()) patience = std::min(patience, kFirstMoments);
    if ((!space.memory.brought() && MayBring(space)) || IsOver(space)) patience = Nanos(0);
  }
  return patience;
}

void LazyServer::OnReadable(int fd) {
  if (fd == pair_.command) return OnCommand();
  if (fd == criu_.get()) return OnCriu();
  if (fd == listener_.get()) return OnConnection();
  if (fd == keeper_pidfd_.get()) {
    (void)ReapChild(keeper_);
    keeper_pidfd_.Reset();
    spdlog::warn("the keeper died; another is started");
    return;
  }
  for (Space& space : state_.spaces()) {
    if (space.memory.uffd() == fd) return OnEvents(space);
  }
}

// --- the command ---------------------------------------------------------------------------------

void LazyServer::Tell(AgentMessage::Kind kind, Pid pid, const std::string& text) {
  if (pair_.command >= 0) (void)PostMessage(pair_.command, MakeMessage(kind, pid, text));
}

void LazyServer::OnCommand() {
  using Kind = AgentMessage::Kind;
  Fd passed;
  const auto message = NextMessage(pair_.command, &passed);
  if (!message || !*message) {
    if (!state_.running()) return EndProgram("the command that restored it died");
    Fd(std::exchange(pair_.command, -1)).Reset();
    return UnfinishedRestore(pair_.view).RemoveView();
  }
  switch ((*message)->kind) {
    case Kind::kRestoring:
      return Record({.kind = LazyRecord::Kind::kCriu, .pid = (*message)->pid});
    case Kind::kExpect:
      listener_ = std::move(passed);
      return ForgetEndedProcesses();
    case Kind::kAdopt:
      return Adopt(**message);
    case Kind::kResume:
      return Resume();
    case Kind::kStandDown:
      return GiveUp();
    default:
      return;
  }
}

void LazyServer::Adopt(const AgentMessage& message) {
  const auto process = ReadProcess(Pid{message.pid});
  if (!process) return EndProgram(fmt::format("process {} ended before it ran", message.pid));
  const int vpid = process->ns_pids.empty() ? message.pid : process->ns_pids.back();
  Record({.kind = LazyRecord::Kind::kAdopted,
          .pid = message.pid,
          .vpid = static_cast<uint32_t>(vpid),
          .stay_stopped = message.stay_stopped ? 1u : 0u});
}

void LazyServer::Resume() {
  if (const auto received = ReceiveAll(); !received) return EndProgram(received.error().message());
  if (!IsAllWatched()) return EndProgram("criu did not hand over the userfaultfd of every task");
  SaveProgress();
  for (const LazyState::Adopted& task : state_.adopted()) {
    if (task.stay_stopped) continue;
    if (const auto runs = ContinueUnnoticed(task.pid); !runs) {
      return EndProgram(runs.error().message());
    }
  }
  Record({.kind = LazyRecord::Kind::kRunning});
  TellThatItRuns();
}

// What no userfaultfd watches reads as zeros.
bool LazyServer::IsAllWatched() {
  const auto is_watched = [this](const LazyTask& task) {
    return task.pages.empty() || std::ranges::any_of(state_.spaces(), [&](const Space& space) {
             return space.vpid == task.vpid && !space.forked;
           });
  };
  return std::ranges::all_of(pair_.image.tasks, is_watched);
}

// The command ends what was restored itself.
void LazyServer::GiveUp() {
  Record({.kind = LazyRecord::Kind::kFinished});
  if (pair_.command >= 0) ShutDown(pair_.command);
}

// --- criu ----------------------------------------------------------------------------------------

void LazyServer::OnConnection() {
  if (auto connection = AcceptConnection(listener_.get())) criu_ = std::move(*connection);
  listener_.Reset();
}

// What criu has sent is all there once the command says that the tasks are; it may not have been
// looked at.
Result<> LazyServer::ReceiveAll() {
  const bool connected =
      listener_.valid() && WaitReadable(listener_.get(), Nanos(0)).value_or(false);
  if (connected) OnConnection();
  while (criu_.valid()) UNMOOR_TRY(ReceiveTask());
  return {};
}

void LazyServer::OnCriu() {
  if (const auto received = ReceiveTask(); !received) EndProgram(received.error().message());
}

// criu's lazy-pages protocol: a task's virtual pid, then its userfaultfd beside one byte. A
// zombie's pid is negative and has none.
Result<> LazyServer::ReceiveTask() {
  int32_t vpid = 0;
  UNMOOR_ASSIGN(const ReceivedMessage word,
                ReceiveMessage(criu_.get(), std::as_writable_bytes(std::span(&vpid, 1)), "criu"));
  if (word.size == 0 || vpid == kRestoreFinished) {
    criu_.Reset();
    return {};
  }
  if (word.size != sizeof(vpid))
    return MachineError("cannot understand criu's lazy-pages protocol");
  if (vpid < 0) return {};
  std::byte nothing{};
  UNMOOR_ASSIGN(ReceivedMessage passed,
                ReceiveMessage(criu_.get(), std::span(&nothing, 1), "criu"));
  if (!passed.passed.valid()) return MachineError("criu handed over no userfaultfd");
  Record({.kind = LazyRecord::Kind::kTask,
          .uffd = passed.passed.Release(),
          .vpid = static_cast<uint32_t>(vpid)});
  return {};
}

// --- the program's memory ------------------------------------------------------------------------

void LazyServer::OnEvents(Space& space) {
  for (int i = 0; i < kEventsInARow; ++i) {
    const auto more = OnEvent(space);
    if (!more) return EndProgram(more.error().message());
    if (!*more) return;
    events_came_ = true;
  }
}

Result<bool> LazyServer::OnEvent(Space& space) {
  const int uffd = space.memory.uffd();
  pair_.journal.BeginReading();
  UNMOOR_ASSIGN(auto event, ReadUffdEvent(uffd));
  if (!event || event->kind == UffdEvent::Kind::kFault) {
    pair_.journal.EndReading();
    if (event) space.memory.Waits(event->range);
    return event.has_value();
  }
  UNMOOR_TRY(FaultPoint("lazy.event_read"));
  switch (event->kind) {
    case UffdEvent::Kind::kFork:
      Record(
          {.kind = LazyRecord::Kind::kForked, .uffd = event->child.Release(), .parent_uffd = uffd});
      state_.spaces().back().not_before = MonotonicNow() + pair_.options.child_delay;
      break;
    case UffdEvent::Kind::kRemap:
      Record(
          {.kind = LazyRecord::Kind::kMoved, .uffd = uffd, .range = event->range, .to = event->to});
      break;
    case UffdEvent::Kind::kRemove:
    case UffdEvent::Kind::kUnmap:
      Record({.kind = LazyRecord::Kind::kGivenBack, .uffd = uffd, .range = event->range});
      break;
    default:
      break;
  }
  pair_.journal.EndReading();
  return true;
}

// A child made for a snapshot would otherwise have its memory brought just before it exits.
bool LazyServer::MayBring(const Space& space) const {
  const Nanos now = MonotonicNow();
  if (!state_.running() || now < space.no_room_before) return false;
  if (SignalSeen()) return true;  // somebody waits for all of it
  const bool rest = now - running_since_ >= kFirstMoments && now >= space.not_before &&
                    FaultPoint("lazy.bring_rest").has_value();
  return (space.memory.has_first() || rest) && FaultPoint("lazy.bring").has_value();
}

// Before each block that is brought; not each time, since it looks at much.
void LazyServer::ExpectNext() {
  if (!source_.ShouldExpect()) return;
  std::vector<Space*> bringing;
  for (Space& space : state_.spaces()) {
    if (!space.memory.brought() && MayBring(space)) bringing.push_back(&space);
  }
  std::vector<BlockName> blocks;
  for (Space* const space : bringing) {
    const auto next = space->memory.Upcoming(source_.ahead() / bringing.size());
    blocks.insert(blocks.end(), next.begin(), next.end());
  }
  source_.Expect(blocks);
}

// What nobody has touched must not be what the program is killed for. A page somebody waits for
// comes in any case: so it would without us.
bool LazyServer::HasRoom(Space& space) {
  const LazyState::Adopted* const task = state_.FindAdopted(space.vpid);
  if (task == nullptr) return true;
  const auto [entry, is_new] = rooms_.try_emplace(task->pid.value, task->pid);
  MemoryRoom& room = entry->second;
  if (is_new || !space.no_room.empty()) room.FindGroups();
  const auto taken = room.Take(Bytes(kBlockSize));
  space.no_room = taken ? std::string() : taken.error().message();
  if (!taken) space.no_room_before = MonotonicNow() + kLookAgain;
  return taken.has_value();
}

void LazyServer::StepAll() {
  rounds_for_faults_ = events_came_ ? rounds_for_faults_ + 1 : 0;
  std::vector<Space*> spaces;
  for (Space& space : state_.spaces()) spaces.push_back(&space);
  for (Space* const space : spaces) {
    StepOne(*space);
    if (state_.finished()) return;
  }
  if (rounds_for_faults_ >= kRoundsForFaults) rounds_for_faults_ = 0;
  if (MonotonicNow() - last_look_ > kLookAgain) CloseOfEnded();
  // The command removes its view as soon as the program runs, unless it dies.
  const auto view_is_left = [&] { return pair_.command >= 0 && Exists(pair_.view); };
  if (state_.running() && state_.spaces().empty() && !view_is_left()) {
    Record({.kind = LazyRecord::Kind::kFinished});
  }
}

void LazyServer::StepOne(Space& space) {
  auto step = space.memory.ServeWaiting(source_);
  const bool faults_first = events_came_ && rounds_for_faults_ < kRoundsForFaults;
  if (step && *step == Step::kDone && !faults_first && MayBring(space) && HasRoom(space)) {
    ExpectNext();
    step = space.memory.BringNext(source_);
  }
  if (!step) return EndProgram(step.error().message());
  if (*step == Step::kWait) waited_ = true;
  if (*step == Step::kGone || IsOver(space)) Close(space);
}

// Whether nothing can be asked for any more. An event under way may be a fork whose child needs
// what was here when it was born.
bool LazyServer::IsOver(Space& space) {
  return state_.running() && space.memory.complete() && !space.memory.somebody_waits() &&
         !UffdIsChanging(space.memory.uffd());
}

// The kernel lets go of all who wait when the last copy of the descriptor is closed.
void LazyServer::Close(Space& space) {
  const int uffd = space.memory.uffd();
  if (!space.forked) SaveProgress(space, true, "");
  Fd(uffd).Reset();  // before it is recorded: a closed one is found to be gone, an open one waits
  Record({.kind = LazyRecord::Kind::kClosed, .uffd = uffd});
}

// Pages of a program that has ended will not be asked for; of its children it is seen when the next
// one is brought.
void LazyServer::CloseOfEnded() {
  last_look_ = MonotonicNow();
  if (!state_.running()) return;
  std::vector<Space*> over;
  for (Space& space : state_.spaces()) {
    const auto process = ProcessOf(space);
    const bool ended = !process || process->ended();
    if (ended && (!space.forked || space.memory.brought())) over.push_back(&space);
  }
  for (Space* const space : over) Close(*space);
}

void LazyServer::EndProgram(const std::string& why) {
  spdlog::error("the program is ended: {}", why);
  std::vector<Pid> tasks;
  for (const LazyState::Adopted& task : state_.adopted()) tasks.push_back(task.pid);
  for (Space& space : state_.spaces()) {
    if (!space.forked && state_.running()) SaveProgress(space, true, why);
  }
  if (state_.running()) {
    EndTasks(tasks);
  } else {
    Tell(AgentMessage::Kind::kFailed, tasks.empty() ? Pid{} : tasks.front(), why);
    UnfinishedRestore restore(pair_.view);
    restore.CriuIs(state_.criu());
    restore.End(tasks);
  }
  GiveUp();
}

// The restored task that it is, or is forked from; nothing when that has ended.
std::optional<ProcessInfo> LazyServer::ProcessOf(const Space& space) const {
  const LazyState::Adopted* const task = state_.FindAdopted(space.vpid);
  if (task == nullptr) return std::nullopt;
  auto process = ReadProcess(task->pid);
  if (!process) return std::nullopt;
  return *std::move(process);
}

// --- progress ------------------------------------------------------------------------------------

void LazyServer::SaveProgress() {
  last_saved_ = MonotonicNow();
  for (const Space& space : state_.spaces()) {
    const std::string problem = space.no_room.empty() ? space.memory.problem() : space.no_room;
    if (!space.forked) SaveProgress(space, false, problem);
  }
}

void LazyServer::SaveProgress(const Space& space, bool finished, const std::string& problem) {
  const auto process = ProcessOf(space);
  if (!process) return;
  ProgressFile progress;
  progress.pid = process->pid;
  progress.start_time = process->start_time;
  progress.worker = OwnPid();
  progress.supervisor = keeper_;
  progress.finished = finished;
  progress.lazy = true;
  progress.problem = problem;
  progress.report.total = space.memory.total();
  progress.report.done = space.memory.come();
  progress.report.dropped = space.memory.given_back();
  progress.report.elapsed = MonotonicNow() - began_;
  if (state_.running() && running_since_.value > 0) {
    const Nanos taken = MonotonicNow() - running_since_;
    progress.report.copy_rate = static_cast<double>(progress.report.done.value) * 1e9 /
                                static_cast<double>(std::max<int64_t>(1, taken.value));
  }
  if (const auto saved = WriteProgress(progress); !saved) {
    spdlog::debug("{}", saved.error().message());
  }
}

// `follows`: an earlier server has died, or finished.
[[noreturn]] void Serve(Pair& pair, bool follows) {
  LazyServer server(pair);
  if (follows) server.Follow();
  server.Run();
  ExitProcess(0);
}

// --- the keeper ----------------------------------------------------------------------------------

[[noreturn]] void Keep(Pair& pair, int server) {
  IgnoreSignal();
  while (!WaitReadable(server, Nanos(-1)).value_or(false)) {
  }
  Fd(server).Reset();
  Serve(pair, true);
}

}  // namespace

Result<SupervisorHandle> StartLazyServer(const LazyImage& image, const AgentOptions& options,
                                         const std::string& view) {
  UNMOOR_ASSIGN(StreamPair pair, CreateMessagePair());
  UNMOOR_ASSIGN(const LazyJournal journal, LazyJournal::Create());
  std::vector<int> keep = {pair.theirs.get()};
  for (const auto& layer : image.layers) keep.push_back(layer->file().get());
  std::ranges::sort(keep);
  UNMOOR_ASSIGN(auto handle, ForkAgent(pair, keep, options));
  if (handle) return *std::move(handle);
  Pair own{image, options, view, journal, pair.theirs.Release()};
  Serve(own, false);
}

}  // namespace unmoor
