// See restore.h.
#include "restore/restore.h"

#include <fcntl.h>
#include <sys/wait.h>

#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <set>

#include "agent/known_image.h"
#include "base/fault_point.h"
#include "base/log.h"
#include "criu/rewrite.h"
#include "criu/runner.h"
#include "image/directory_lock.h"
#include "image/layer_reader.h"
#include "image/layout.h"
#include "image/manifest.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "restore/plan.h"

namespace unmoor {
namespace {

constexpr int kFirstLayerFd = 3;  // inside criu
// A program just killed keeps its id until it has ended and its parent has reaped it.
constexpr Nanos kZombiePatience{5'000'000'000};
constexpr Nanos kDyingPatience{250'000'000};

// A directory that is gone when we are done, whatever happens. criu's log is moved out on failure.
class TemporaryView {
 public:
  [[nodiscard]] static Result<TemporaryView> Create() {
    const char* const named = std::getenv("TMPDIR");
    std::string last = "/tmp";
    for (const std::string& parent :
         {std::string(named != nullptr ? named : ""), std::string("/run"), last}) {
      if (parent.empty()) continue;
      if (auto path = MakeTemporaryDirectory(parent, "unmoor-restore-")) {
        TemporaryView view;
        view.path_ = *path;
        UNMOOR_TRY(MakeDirectory(view.images(), 0700));
        return view;
      }
    }
    return MachineError("cannot make a temporary directory in /run or /tmp; set TMPDIR");
  }
  TemporaryView(TemporaryView&& other) noexcept : path_(std::exchange(other.path_, {})) {}
  TemporaryView& operator=(TemporaryView&&) = delete;
  ~TemporaryView() {
    if (!path_.empty()) (void)RemoveTree(path_);
  }

  [[nodiscard]] std::string images() const { return path_ + "/images"; }
  [[nodiscard]] std::string pidfile() const { return path_ + "/pid"; }
  [[nodiscard]] std::string log() const { return path_ + "/criu.log"; }
  // Leaves only the log, for the user to read.
  void KeepLog() {
    (void)RemoveTree(images());
    (void)RemoveTree(pidfile());
    if (Exists(log())) path_.clear();
  }

 private:
  TemporaryView() = default;
  std::string path_;
};

// The view is made of symbolic links to CRIU's files. A program with a mount namespace of its own
// has some of them opened after its root is in place, where an absolute link leads elsewhere: then
// the view gets the files themselves, as hard links where it can.
Result<> ReplaceLinksForMountNamespace(const std::string& criu_directory, const std::string& view) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(criu_directory));
  const auto is_mount_namespace = [](const std::string& name) {
    return name.starts_with("mountpoints-");
  };
  if (std::ranges::none_of(names, is_mount_namespace)) return {};
  for (const std::string& name : names) {
    const std::string from = criu_directory + "/" + name;
    const std::string to = view + "/" + name;
    // O_NOFOLLOW fails on links only: what was rewritten is a file already.
    if (!Exists(to) || OpenFile(to, O_RDONLY | O_NOFOLLOW)) continue;
    UNMOOR_TRY(RemoveFile(to));
    if (!HardLink(from, to)) UNMOOR_TRY(CopyFile(from, to));
  }
  return {};
}

struct RestoredTasks {
  Pid root;
  std::vector<Pid> alive;         // parents before children
  std::vector<Pid> stay_stopped;  // of these, stopped already when dumped
};

class Restorer {
 public:
  Restorer(const RestoreOptions& options, const RestoreObserver& observer)
      : options_(options), observer_(observer) {}
  [[nodiscard]] Result<RestoredProgram> Run();

 private:
  [[nodiscard]] Result<> Lock();
  [[nodiscard]] Result<> Open();
  [[nodiscard]] Result<> CheckFreePids() const;
  [[nodiscard]] Result<> RunCriu(const TemporaryView& view, InterruptFd& interrupt);
  [[nodiscard]] std::set<size_t> MappedLayers() const;
  [[nodiscard]] criu::CriuCommand Command(const TemporaryView& view) const;
  [[nodiscard]] Result<RestoredTasks> FindTasks(const TemporaryView& view) const;
  [[nodiscard]] Result<> LetRun(const RestoredTasks& tasks, InterruptFd& interrupt);

  const RestoreOptions& options_;
  const RestoreObserver& observer_;
  std::string image_;  // the directory asked for, or what it was unpacked to
  std::string directory_;
  DirectoryLock lock_;  // until criu has read everything
  Manifest manifest_;
  std::vector<LayerReader> layers_;
  RestorePlan plan_;
  RestoreReport report_;
};

Result<> Restorer::Lock() {
  image_ = options_.directory;
  UNMOOR_ASSIGN(lock_, DirectoryLock::Take(image_, LockUse::kRead));
  UNMOOR_ASSIGN(report_.unpacked, UnpackForRestore(image_, observer_.unpacking));
  if (!report_.unpacked) return {};
  image_ = report_.unpacked->directory;
  UNMOOR_ASSIGN(lock_, DirectoryLock::Take(image_, LockUse::kRead));
  return {};
}

Result<> Restorer::Open() {
  UNMOOR_ASSIGN(manifest_, ReadManifest(image_));
  UNMOOR_ASSIGN(directory_, RealPath(image_));
  UNMOOR_ASSIGN(const HostFacts host, ReadHostFacts());
  UNMOOR_TRY(CheckHost(manifest_, host));
  std::vector<LayerInfo> infos;
  for (const ManifestLayer& entry : manifest_.layers) {
    UNMOOR_ASSIGN(LayerReader reader, LayerReader::Open(directory_, entry));
    infos.push_back(reader.info());
    layers_.push_back(std::move(reader));
  }
  UNMOOR_ASSIGN(plan_, PlanRestore(manifest_, infos, directory_));
  report_.mapped = plan_.mapped;
  report_.data = plan_.data;
  report_.loaded = plan_.loaded;
  report_.mappings = plan_.mappings;
  return {};
}

// Those that CRIU has to map; layers of deltas only are read here.
std::set<size_t> Restorer::MappedLayers() const {
  std::set<size_t> layers;
  for (const criu::TaskMapping& task : plan_.tasks) {
    for (const criu::DirectMapping& mapping : task.mappings) layers.insert(mapping.layer);
  }
  return layers;
}

criu::CriuCommand Restorer::Command(const TemporaryView& view) const {
  criu::CriuCommand command;
  command.args = {"restore", "-D", view.images(), "-d", "--pidfile", view.pidfile()};
  if (plan_.mappings > 0) command.args.push_back("--leave-stopped");
  for (const size_t i : MappedLayers()) {
    const int as = kFirstLayerFd + static_cast<int>(i);
    command.fds.push_back({layers_[i].pages_fd().get(), as});
    command.args.push_back("--inherit-fd");
    command.args.push_back(criu::InheritFdArgument(as, static_cast<uint32_t>(i)));
  }
  if (options_.verbose) command.args.push_back("-v4");
  command.args.insert(command.args.end(), options_.criu_arguments.begin(),
                      options_.criu_arguments.end());
  command.log_path = view.log();
  return command;
}

// CRIU says "Can't fork: File exists"; better to say which process it is. In a PID namespace of its
// own (root 1) every id is free.
Result<> Restorer::CheckFreePids() const {
  if (manifest_.root_vpid == 1) return {};
  const Nanos begin = MonotonicNow();
  for (const ManifestTask& task : manifest_.tasks) {
    const Pid pid{static_cast<int>(task.vpid)};
    auto info = ReadProcess(pid);
    while (info) {
      const bool ending = info->ended() || info->kernel_thread;
      if (MonotonicNow() - begin > (ending ? kZombiePatience : kDyingPatience)) break;
      SleepFor(Nanos(2'000'000));
      info = ReadProcess(pid);
    }
    if (!info) continue;
    if (info->state == 'Z') {
      return MachineError(
          "process id {} is still taken by the zombie of {}; its parent {} has to "
          "reap it first, or restore below 'unshare -p'",
          task.vpid, info->name, info->parent.value);
    }
    return UserError(
        "process id {} is in use by {}; end that process first, or restore below "
        "'unshare -p'",
        task.vpid, info->name);
  }
  return {};
}

Result<> Restorer::RunCriu(const TemporaryView& view, InterruptFd& interrupt) {
  UNMOOR_ASSIGN(const criu::CriuBinary criu,
                criu::FindCriu(options_.criu, criu::VersionCheck::kOnFailure));
  criu::CriuCommand command = Command(view);
  bool interrupted = false;
  command.interrupt = &interrupt;
  command.on_interrupt = [&] {
    interrupted = true;
    SignalDescendants(SIGKILL);
  };
  UNMOOR_TRY(FaultPoint("restore.before_criu"));
  const Nanos begin = MonotonicNow();
  const auto outcome = criu::RunCriu(criu, command);
  report_.criu_time = MonotonicNow() - begin;
  if (interrupted) return MachineError("interrupted");
  if (!outcome) return Failure(outcome.error());
  return {};
}

Result<RestoredTasks> Restorer::FindTasks(const TemporaryView& view) const {
  RestoredTasks tasks;
  UNMOOR_ASSIGN(const std::string text, ReadFile(view.pidfile(), Bytes(64)));
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), tasks.root.value);
  if (parsed.ec != std::errc()) {
    return MachineError("criu left no process id in {}", view.pidfile());
  }
  UNMOOR_ASSIGN(const std::vector<Pid> tree, ReadTree(tasks.root));
  for (const Pid pid : tree) {
    const auto info = ReadProcess(pid);
    if (!info || info->state == 'Z' || info->kernel_thread) continue;
    tasks.alive.push_back(pid);
    const auto vpid =
        static_cast<uint32_t>(info->ns_pids.empty() ? pid.value : info->ns_pids.back());
    if (std::ranges::find(plan_.stopped, vpid) != plan_.stopped.end()) {
      tasks.stay_stopped.push_back(pid);
    }
  }
  return tasks;
}

Result<> Restorer::LetRun(const RestoredTasks& tasks, InterruptFd& interrupt) {
  if (plan_.mappings == 0) return {};  // nothing mapped: criu has let them run
  if (options_.mode == RestoreMode::kEager) {
    for (const Pid pid : tasks.alive) {
      if (interrupt.Take() != 0) return MachineError("interrupted");
      UNMOOR_TRY(RemapProcess(pid, options_.agent, [&](const RemapReport& progress) {
        if (observer_.remapping) observer_.remapping(pid, progress);
      }));
    }
  }
  if (interrupt.Take() != 0) return MachineError("interrupted");
  UNMOOR_TRY(FaultPoint("restore.before_agent"));
  UNMOOR_ASSIGN(report_.agent,
                StartAgentForStopped(tasks.alive, tasks.stay_stopped, options_.agent));
  return {};
}

Result<RestoredProgram> Restorer::Run() {
  const Nanos begin = MonotonicNow();
  UNMOOR_TRY(Lock());
  UNMOOR_TRY(Open());
  UNMOOR_TRY(CheckFreePids());
  UNMOOR_ASSIGN(InterruptFd interrupt, InterruptFd::Create());
  UNMOOR_TRY(BecomeSubreaper());
  UNMOOR_ASSIGN(TemporaryView view, TemporaryView::Create());
  std::vector<criu::LayerFile> files;
  for (const LayerReader& layer : layers_) {
    files.push_back({layer.pages_fd().get(), layer.pages_path()});
  }
  UNMOOR_TRY(
      criu::RewriteForDirectMap(CriuDirectory(directory_), view.images(), plan_.tasks, files));
  UNMOOR_TRY(ReplaceLinksForMountNamespace(CriuDirectory(directory_), view.images()));
  const Nanos prepared = MonotonicNow();
  const auto undo = [&](const Error& error) {
    (void)BecomeSubreaper();
    KillDescendants();
    return Failure(Error(error.kind(), error.errnum(), error.message() + "; nothing was restored"));
  };
  if (auto ran = RunCriu(view, interrupt); !ran) {
    if (ran.error().message().starts_with("criu")) view.KeepLog();
    return undo(ran.error());
  }
  const auto tasks = FindTasks(view);
  if (!tasks) return undo(tasks.error());
  auto pidfd = OpenPidFd(tasks->root);
  if (!pidfd) return undo(pidfd.error());
  const Nanos found = MonotonicNow();
  // The root is our child now. What is orphaned from here on (children of the program, the agent)
  // is not ours to reap.
  lock_.Release();
  if (auto alone = BecomeSubreaper(false); !alone) return undo(alone.error());
  if (auto runs = LetRun(*tasks, interrupt); !runs) return undo(runs.error());

  spdlog::debug("prepared in {}, criu {}, found the tasks in {}, agent {}",
                HumanTime(prepared - begin), HumanTime(report_.criu_time),
                HumanTime(found - prepared - report_.criu_time), HumanTime(MonotonicNow() - found));
  RememberImage(tasks->alive, {directory_, manifest_.checkpoint_id});
  report_.root = tasks->root;
  report_.tasks = tasks->alive;
  report_.elapsed = MonotonicNow() - begin;
  if (!options_.pidfile.empty()) {
    // The program runs: a missing pidfile is worth a warning, not its life.
    if (auto written = WriteFile(options_.pidfile, std::to_string(tasks->root.value)); !written) {
      spdlog::warn("{}", written.error().message());
    }
  }
  return RestoredProgram(std::move(report_), std::move(*pidfd), std::move(interrupt));
}

}  // namespace

Result<std::optional<int>> RestoredProgram::WaitForRoot() {
  UNMOOR_ASSIGN(InterruptFd interrupt, InterruptFd::Create());
  for (;;) {
    UNMOOR_ASSIGN(const WaitOutcome outcome, WaitForExit(pidfd_.get(), Nanos(-1), interrupt.get()));
    if (outcome == WaitOutcome::kExited) break;
    const int signal = interrupt.Take();
    // In our own process group the terminal has told the program too: it decides.
    if (signal == SIGINT && ProcessGroup(report_.root) == ProcessGroup(Pid{0})) continue;
    if (signal != 0) return std::optional<int>();
  }
  const std::optional<int> status = ReapChild(report_.root);
  if (!status)
    return std::optional<int>(0);  // somebody else's child: its status is not ours to know
  return std::optional<int>(WIFSIGNALED(*status) ? 128 + WTERMSIG(*status) : WEXITSTATUS(*status));
}

Result<RestoredProgram> Restore(const RestoreOptions& options, const RestoreObserver& observer) {
  return Restorer(options, observer).Run();
}

}  // namespace unmoor
