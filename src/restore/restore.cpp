// See restore.h.
#include "restore/restore.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <set>

#include "agent/known_image.h"
#include "agent/name_memory.h"
#include "agent/progress_file.h"
#include "base/fault_point.h"
#include "base/log.h"
#include "criu/gate.h"
#include "criu/rewrite.h"
#include "criu/runner.h"
#include "image/directory_lock.h"
#include "image/layer_source.h"
#include "image/layout.h"
#include "image/manifest.h"
#include "os/file.h"
#include "os/kernel_features.h"
#include "os/memory_room.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/socket.h"
#include "restore/fill.h"
#include "restore/free_ids.h"
#include "restore/plan.h"
#include "restore/prefetch.h"

namespace unmoor {
namespace {

constexpr int kGateFd = 3;  // inside criu: two of the gate, then the layers
constexpr int kFirstLayerFd = 5;
constexpr size_t kLayersAtOnce = 128;  // handed to criu before it is known which it maps
constexpr Bytes kDeltasInMemory(uint64_t{16} << 20);
constexpr char kLazySocket[] = "lazy-pages.socket";  // in criu's working directory

// A directory that is gone when we are done, whatever happens. criu's log is moved out on failure.
class TemporaryView {
 public:
  // Its name, before it is there: so that the agent can know it. `in_memory`: preferably on a
  // tmpfs.
  [[nodiscard]] static Result<TemporaryView> Named(bool in_memory) {
    const char* const named = std::getenv("TMPDIR");
    std::vector<std::string> parents = {"/run", "/tmp"};
    if (in_memory && !IsTmpfs("/run").value_or(false) && IsTmpfs("/dev/shm").value_or(false)) {
      parents.insert(parents.begin(), "/dev/shm");
    }
    if (named != nullptr) parents.insert(parents.begin(), named);
    const auto parent = std::ranges::find_if(parents, [](const std::string& path) {
      return OpenFile(path, O_PATH | O_DIRECTORY).has_value();
    });
    if (parent == parents.end()) {
      return MachineError("cannot make a temporary directory in /run or /tmp; set TMPDIR");
    }
    TemporaryView view;
    view.path_ = fmt::format("{}/unmoor-restore-{}-{:x}", *parent, OwnPid().value,
                             static_cast<uint64_t>(MonotonicNow().value));
    return view;
  }
  TemporaryView(TemporaryView&& other) noexcept
      : path_(std::exchange(other.path_, {})), made_(std::exchange(other.made_, false)) {}
  TemporaryView& operator=(TemporaryView&&) = delete;
  ~TemporaryView() { Remove(); }

  [[nodiscard]] Result<> Create() {
    UNMOOR_TRY(MakeDirectory(path_, 0700));
    made_ = true;
    return MakeDirectory(images(), 0700);
  }
  void Remove() {
    if (std::exchange(made_, false)) (void)RemoveTree(path_);
  }

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] std::string images() const { return path_ + "/images"; }
  [[nodiscard]] std::string pidfile() const { return path_ + "/pid"; }
  [[nodiscard]] std::string log() const { return path_ + "/criu.log"; }
  // Leaves only the log, for the user to read.
  void KeepLog() {
    (void)RemoveTree(images());
    (void)RemoveTree(pidfile());
    if (Exists(log())) made_ = false;
  }

 private:
  TemporaryView() = default;
  std::string path_;
  bool made_ = false;
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
    if (criu::Gate::IsPartOf(name)) continue;
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
      : options_(options), observer_(observer), mode_(options.mode) {}
  [[nodiscard]] Result<RestoredProgram> Run();

 private:
  [[nodiscard]] Result<> ChooseMode();
  [[nodiscard]] Result<> Unpack();
  [[nodiscard]] bool MayStartAtOnce() const;
  [[nodiscard]] Bytes MostDeltas() const;
  [[nodiscard]] ModeFacts LookForMode() const;
  [[nodiscard]] Result<> ListLayers(const std::string& directory);
  [[nodiscard]] Result<> Open();
  [[nodiscard]] Result<> NumberLayers();
  [[nodiscard]] std::vector<Pid> NeededIds() const;
  [[nodiscard]] Result<std::vector<LayerInfo>> PrepareToBring();
  [[nodiscard]] Result<> PrepareLazy();
  [[nodiscard]] Result<WaitingAgent> BeginAgent(const TemporaryView& view) const;
  [[nodiscard]] bool lazy() const { return mode_ == RestoreMode::kLazy; }
  [[nodiscard]] bool eager() const { return mode_ == RestoreMode::kEager; }
  [[nodiscard]] Result<Fd> Restore(TemporaryView& view, std::optional<WaitingAgent>& agent,
                                   InterruptFd& interrupt);
  [[nodiscard]] Result<> Finish(criu::RunningCriu& criu);
  [[nodiscard]] Result<> FillView(const TemporaryView& view) const;
  [[nodiscard]] std::set<size_t> MappedLayers() const;
  [[nodiscard]] criu::CriuCommand Command(const TemporaryView& view, const criu::Gate& gate,
                                          InterruptFd& interrupt) const;
  [[nodiscard]] Result<std::vector<Pid>> ReadForkedTree(Pid root) const;
  [[nodiscard]] Result<RestoredTasks> FindTasks(const TemporaryView& view) const;
  [[nodiscard]] Result<> PrepareFill();
  [[nodiscard]] Result<> FillTasks(const RestoredTasks& tasks, InterruptFd& interrupt);

  const RestoreOptions& options_;
  const RestoreObserver& observer_;
  RestoreMode mode_;
  std::string image_;  // the directory asked for, or what it was unpacked to
  std::string directory_;
  DirectoryLock lock_;  // until criu has read everything
  // What DIR holds, whatever the manifest says: criu can be given it before that is read. The
  // plan's layers are numbered as these.
  struct ListedLayer {
    std::string id;
    std::string path;
    Fd pages;
    bool packed = false;
  };
  [[nodiscard]] static std::optional<Bytes> BytesOnDisk(const ListedLayer& layer);
  [[nodiscard]] Bytes DataOfPacked(const ListedLayer& layer) const;
  std::vector<ListedLayer> listed_;
  bool opened_ = false;  // from here on:
  Manifest manifest_;
  LayerSources layers_;
  RestorePlan plan_;
  LazyImage lazy_;  // has the layers then
  std::optional<Prefetch> prefetch_;
  std::vector<FillTask> fill_;
  RestoreReport report_;
};

// Only pages of a file that is not packed can be mapped.
Result<> Restorer::Unpack() {
  UNMOOR_ASSIGN(report_.unpacked, UnpackForRestore(image_, observer_.unpacking));
  if (!report_.unpacked) return {};
  image_ = report_.unpacked->directory;
  UNMOOR_ASSIGN(lock_, DirectoryLock::Take(image_, LockUse::kRead));
  return {};
}

std::optional<Bytes> Restorer::BytesOnDisk(const ListedLayer& layer) {
  const auto info = StatFd(layer.pages.get(), layer.path);
  if (!info) return std::nullopt;
  return Bytes(static_cast<uint64_t>(info->st_blocks) * 512);
}

// REQUIRES the manifest.
Bytes Restorer::DataOfPacked(const ListedLayer& layer) const {
  const auto entry = std::ranges::find(manifest_.layers, layer.id, &ManifestLayer::id);
  return entry == manifest_.layers.end() ? Bytes() : entry->data;
}

// It looks like a checkpoint of processes. Whether it is a good one is seen while criu starts.
bool Restorer::MayStartAtOnce() const {
  return Exists(ManifestPath(image_)) && Exists(CriuDirectory(image_) + "/pstree.img") &&
         listed_.size() <= kLayersAtOnce;
}

// What may have to be written into the view: the pages of deltas, and no one is larger than its
// layer.
Bytes Restorer::MostDeltas() const {
  Bytes all;
  Bytes largest;
  for (const ListedLayer& layer : listed_) {
    const Bytes size = BytesOnDisk(layer).value_or(kDeltasInMemory);
    all += size;
    largest = std::max(largest, size);
  }
  return all - largest;
}

Result<> Restorer::ListLayers(const std::string& directory) {
  listed_.clear();
  const auto names = ListDirectory(LayersDirectory(directory));
  if (!names) return {};  // the manifest tells whether that is wrong
  for (const std::string& name : *names) {
    const bool packed = name.ends_with(kPackedSuffix);
    if (!packed && !name.ends_with(kPagesSuffix)) continue;
    ListedLayer layer;
    layer.id = name.substr(0, name.rfind('.'));
    layer.path = LayersDirectory(directory) + "/" + name;
    layer.packed = packed;
    const std::string pages = layer.id + std::string(kPagesSuffix);
    if (packed && std::ranges::binary_search(*names, pages)) continue;
    UNMOOR_ASSIGN(layer.pages, OpenRegularFile(layer.path));
    listed_.push_back(std::move(layer));
  }
  return {};
}

// Where a packed image was unpacked by an earlier restore, by what that looks like.
Result<> Restorer::ChooseMode() {
  UNMOOR_ASSIGN(const auto unpacked, FindUnpacked(image_));
  UNMOOR_TRY(ListLayers(unpacked.value_or(image_)));
  if (std::ranges::any_of(listed_, &ListedLayer::packed)) {
    UNMOOR_ASSIGN(manifest_, ReadManifest(image_));
  }
  ModeChoice choice = unmoor::ChooseMode(LookForMode());
  mode_ = choice.mode;
  report_.why_mode = std::move(choice.why);
  return {};
}

ModeFacts Restorer::LookForMode() const {
  ModeFacts facts;
  facts.cached = Bytes();
  for (const ListedLayer& layer : listed_) {
    const int fd = layer.pages.get();
    facts.packed = facts.packed || layer.packed;
    facts.data += layer.packed ? DataOfPacked(layer) : BytesOnDisk(layer).value_or(Bytes());
    const auto cached = CachedBytes(fd, layer.path);
    if (!cached) facts.cached.reset();
    if (cached && facts.cached) *facts.cached += *cached;
    facts.storage = StorageOf(fd, layer.path).value_or(facts.storage);
  }
  const KernelFeatures features = KernelFeatures::Probe();
  facts.can_watch = features.HasUffd() && features.Has(UffdFeature::kEventRemove) &&
                    features.Has(UffdFeature::kWpAsync) && features.pagemap_scan &&
                    features.procmap_query;
  MemoryRoom room(OwnPid());
  room.FindGroups();
  if (const auto has = room.CanTake(facts.data); !has) facts.lacks_room = has.error().message();
  return facts;
}

Result<> Restorer::NumberLayers() {
  std::vector<uint32_t> numbers;
  for (const auto& layer : layers_) {
    const auto found = std::ranges::find(listed_, layer->info().id, &ListedLayer::id);
    if (found == listed_.end()) return MachineError("{} has just appeared", layer->path());
    numbers.push_back(static_cast<uint32_t>(found - listed_.begin()));
  }
  for (criu::TaskMapping& task : plan_.tasks) {
    for (criu::DirectMapping& mapping : task.mappings) mapping.layer = numbers[mapping.layer];
    for (criu::DirectMapping& load : task.loads) load.layer = numbers[load.layer];
  }
  return {};
}

Result<> Restorer::Open() {
  UNMOOR_ASSIGN(manifest_, ReadManifest(image_));
  UNMOOR_ASSIGN(directory_, RealPath(image_));
  UNMOOR_ASSIGN(const HostFacts host, ReadHostFacts());
  UNMOOR_TRY(CheckHost(manifest_, host));
  std::vector<LayerInfo> infos;
  for (const ManifestLayer& entry : manifest_.layers) {
    UNMOOR_ASSIGN(std::unique_ptr<LayerSource> layer, LayerSource::Open(directory_, entry));
    infos.push_back(layer->info());
    layers_.push_back(std::move(layer));
  }
  UNMOOR_ASSIGN(plan_, PlanRestore(manifest_, infos, directory_));
  UNMOOR_TRY(NumberLayers());
  opened_ = true;
  report_.mapped = plan_.mapped;
  report_.data = plan_.data;
  report_.loaded = plan_.loaded;
  report_.mappings = plan_.mappings;
  return {};
}

// For a mode that maps nothing: we bring the pages, held against their hashes.
Result<std::vector<LayerInfo>> Restorer::PrepareToBring() {
  std::vector<LayerInfo> infos;
  for (const auto& layer : layers_) {
    UNMOOR_TRY(layer->LoadHashes());
    infos.push_back(layer->info());
  }
  report_.mapped = Bytes();
  report_.mappings = 0;
  return infos;
}

Result<> Restorer::PrepareLazy() {
  UNMOOR_ASSIGN(const std::vector<LayerInfo> infos, PrepareToBring());
  UNMOOR_ASSIGN(lazy_.tasks, PlanLazyPages(manifest_, infos, directory_));
  if (prefetch_) PlanFirstPages(prefetch_->set, infos, lazy_.tasks);
  lazy_.layers = std::move(layers_);
  report_.loaded = Bytes();
  return {};
}

Result<> Restorer::PrepareFill() {
  UNMOOR_ASSIGN(const std::vector<LayerInfo> infos, PrepareToBring());
  UNMOOR_ASSIGN(fill_, PlanFill(manifest_, infos, directory_));
  report_.loaded = report_.data;
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

criu::CriuCommand Restorer::Command(const TemporaryView& view, const criu::Gate& gate,
                                    InterruptFd& interrupt) const {
  criu::CriuCommand command;
  command.args = {"restore", "-D", view.images(), "-d", "--pidfile", view.pidfile()};
  command.fds = gate.fds();
  if (!listed_.empty()) command.args.push_back("--leave-stopped");
  if (lazy() && !listed_.empty()) command.args.push_back("--lazy-pages");
  const std::set<size_t> mapped = MappedLayers();
  const bool maps = mode_ == RestoreMode::kDirect;
  for (size_t i = 0; i < listed_.size() && maps; ++i) {
    if (opened_ && !mapped.contains(i)) continue;
    const int as = kFirstLayerFd + static_cast<int>(i);
    command.fds.push_back({listed_[i].pages.get(), as});
    command.args.push_back("--inherit-fd");
    command.args.push_back(criu::InheritFdArgument(as, static_cast<uint32_t>(i)));
  }
  if (options_.verbose) command.args.push_back("-v4");
  command.args.insert(command.args.end(), options_.criu_arguments.begin(),
                      options_.criu_arguments.end());
  command.log_path = view.log();
  command.interrupt = &interrupt;
  command.on_interrupt = [] { SignalDescendants(SIGKILL); };
  return command;
}

// In a PID namespace of its own (root 1) every id is free.
std::vector<Pid> Restorer::NeededIds() const {
  std::vector<Pid> ids;
  if (manifest_.root_vpid == 1) return ids;
  for (const ManifestTask& task : manifest_.tasks) ids.push_back(Pid{static_cast<int>(task.vpid)});
  return ids;
}

Result<> Restorer::FillView(const TemporaryView& view) const {
  std::vector<criu::LayerFile> files;
  for (const ListedLayer& layer : listed_) files.push_back({layer.pages.get(), layer.path});
  const std::string criu = CriuDirectory(directory_);
  const std::span<const criu::TaskMapping> mapped =
      eager() ? std::span<const criu::TaskMapping>() : plan_.tasks;
  UNMOOR_TRY(lazy() ? criu::RewriteForLazyPages(criu, view.images(), plan_.tasks)
                    : criu::RewriteForDirectMap(criu, view.images(), mapped, files));
  return ReplaceLinksForMountNamespace(CriuDirectory(directory_), view.images());
}

Result<std::vector<Pid>> Restorer::ReadForkedTree(Pid root) const {
  if (listed_.empty()) return ReadTree(root);  // it runs
  // Still as criu forked it: each child by its parent's main thread.
  std::vector<Pid> tree = {root};
  for (size_t i = 0; i < tree.size(); ++i) {
    const std::vector<Pid> children = ReadChildrenOf(tree[i], tree[i]);
    tree.insert(tree.end(), children.begin(), children.end());
  }
  return tree;
}

Result<RestoredTasks> Restorer::FindTasks(const TemporaryView& view) const {
  RestoredTasks tasks;
  UNMOOR_ASSIGN(const std::string text, ReadFile(view.pidfile(), Bytes(64)));
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), tasks.root.value);
  if (parsed.ec != std::errc()) {
    return MachineError("criu left no process id in {}", view.pidfile());
  }
  UNMOOR_ASSIGN(const std::vector<Pid> tree, ReadForkedTree(tasks.root));
  for (const Pid pid : tree) {
    const auto info = ReadProcess(pid);
    if (!info || info->ending()) continue;
    tasks.alive.push_back(pid);
    const auto vpid =
        static_cast<uint32_t>(info->ns_pids.empty() ? pid.value : info->ns_pids.back());
    if (std::ranges::find(plan_.stopped, vpid) != plan_.stopped.end()) {
      tasks.stay_stopped.push_back(pid);
    }
  }
  return tasks;
}

Result<> Restorer::FillTasks(const RestoredTasks& tasks, InterruptFd& interrupt) {
  const Nanos begin = MonotonicNow();
  std::vector<FillTarget> targets;
  Bytes total;
  for (const Pid pid : tasks.alive) {
    UNMOOR_ASSIGN(const ProcessInfo process, ReadProcess(pid));
    const auto vpid =
        static_cast<uint32_t>(process.ns_pids.empty() ? pid.value : process.ns_pids.back());
    const auto task = std::ranges::find(fill_, vpid, &FillTask::vpid);
    if (task == fill_.end()) continue;
    targets.push_back({pid, &*task});
    total += task->size;
  }
  FillOptions options;
  options.huge = MayUseHugePages(options_.agent.thp);
  options.look = [&](Bytes done) -> Result<> {
    if (interrupt.Take() != 0) return MachineError("interrupted");
    if (observer_.filling) observer_.filling(done, total);
    return {};
  };
  UNMOOR_TRY(Fill(targets, layers_, options));
  for (const FillTarget& target : targets) NameMemory(target.pid, target.task->names);
  report_.fill_time = MonotonicNow() - begin;
  return {};
}

Result<WaitingAgent> Restorer::BeginAgent(const TemporaryView& view) const {
  return lazy() ? WaitingAgent::BeginLazy(lazy_, options_.agent, view.path())
                : WaitingAgent::Begin(options_.agent, view.path());
}

// What can be done beforehand is done while criu starts, and what can wait while it ends. A failure
// leaves processes below us, and `agent` waiting.
Result<Fd> Restorer::Restore(TemporaryView& view, std::optional<WaitingAgent>& agent,
                             InterruptFd& interrupt) {
  const Nanos begin = MonotonicNow();
  UNMOOR_ASSIGN(directory_, RealPath(image_));
  const bool mapped = !listed_.empty();
  if (mapped) {
    UNMOOR_ASSIGN(WaitingAgent begun, BeginAgent(view));
    agent.emplace(std::move(begun));
  }
  UNMOOR_TRY(view.Create());
  Fd listener;
  if (mapped && lazy()) {
    UNMOOR_ASSIGN(listener, ListenInDirectory(view.images(), kLazySocket));
  }
  UNMOOR_ASSIGN(const criu::CriuBinary binary,
                criu::FindCriu(options_.criu, criu::VersionCheck::kOnFailure));
  UNMOOR_ASSIGN(criu::Gate gate,
                criu::Gate::Create(CriuDirectory(directory_), view.images(), kGateFd));
  UNMOOR_ASSIGN(criu::RunningCriu criu,
                criu::RunningCriu::Start(binary, Command(view, gate, interrupt)));
  const Nanos criu_started = MonotonicNow();
  TakeShortTurns();
  gate.CriuStarted();
  if (agent) {
    UNMOOR_TRY(agent->Started());
    prefetch_.reset();  // it is no child of ours any more
    UNMOOR_TRY(agent->Guard(criu.pid()));
  }
  UNMOOR_TRY(BecomeSubreaper());
  if (!opened_) UNMOOR_TRY(Open());
  if (agent) UNMOOR_TRY(agent->Expect(manifest_.tasks.size(), listener.get()));
  listener.Reset();
  UNMOOR_TRY(AwaitFreeIds(NeededIds()));
  UNMOOR_TRY(FillView(view));
  if (eager()) UNMOOR_TRY(PrepareFill());
  UNMOOR_TRY(FaultPoint("restore.before_criu"));
  report_.criu_waited = SleepsInCall(criu.pid(), SYS_read);
  UNMOOR_TRY(gate.Open());
  const Nanos prepared = MonotonicNow();

  UNMOOR_ASSIGN(const bool restored, criu.WaitFor(gate.restored()));
  report_.criu_time = MonotonicNow() - criu_started;
  const bool early = restored && mapped && !eager();
  if (!early) UNMOOR_TRY(Finish(criu));
  if (!restored) report_.criu_time = MonotonicNow() - criu_started;
  UNMOOR_ASSIGN(const RestoredTasks tasks, FindTasks(view));
  UNMOOR_ASSIGN(Fd pidfd, OpenPidFd(tasks.root));
  if (agent && eager()) UNMOOR_TRY(FillTasks(tasks, interrupt));
  UNMOOR_TRY(FaultPoint("restore.before_agent"));
  if (agent) UNMOOR_TRY(agent->Adopt(tasks.alive, tasks.stay_stopped));
  const Nanos found = MonotonicNow();
  if (early) UNMOOR_TRY(Finish(criu));
  report_.root = tasks.root;
  report_.tasks = tasks.alive;
  if (interrupt.Take() != 0) return MachineError("interrupted");
  if (agent) UNMOOR_TRY(agent->LetRun());
  UNMOOR_TRY(FaultPoint("restore.program_runs"));
  view.Remove();
  if (!agent) ForgetEndedProcesses();
  RememberImage(tasks.alive, {directory_, manifest_.checkpoint_id});
  if (agent) {
    UNMOOR_ASSIGN(report_.agent, agent->AwaitRunning());
  }
  spdlog::debug("criu started after {}, let go on after {}{}, its tasks ready after {}, agent {}",
                HumanTime(criu_started - begin), HumanTime(prepared - criu_started),
                report_.criu_waited ? " (it had to wait)" : "", HumanTime(report_.criu_time),
                HumanTime(MonotonicNow() - found));
  return pidfd;
}

Result<> Restorer::Finish(criu::RunningCriu& criu) {
  const auto outcome = criu.Finish();
  if (criu.interrupted()) return MachineError("interrupted");
  if (!outcome) return Failure(outcome.error());
  lock_.Release();
  // The root is our child now. What is orphaned from here on (children of the program, other
  // agents) is not ours to reap.
  return BecomeSubreaper(false);
}

Result<RestoredProgram> Restorer::Run() {
  const Nanos begin = MonotonicNow();
  image_ = options_.directory;
  UNMOOR_ASSIGN(lock_, DirectoryLock::Take(image_, LockUse::kRead));
  if (mode_ == RestoreMode::kAuto) UNMOOR_TRY(ChooseMode());
  report_.mode = mode_;
  if (mode_ == RestoreMode::kDirect) UNMOOR_TRY(Unpack());
  UNMOOR_TRY(ListLayers(image_));
  if (options_.recorded) {
    for (const ListedLayer& layer : listed_) ForgetCached(layer.pages.get());
  }
  // Eager reads everything, and in an order of its own.
  if (options_.prefetch && !eager() && !listed_.empty()) {
    if (auto prefetch = BeginPrefetch(image_)) {
      report_.prefetched = prefetch->set.size();
      prefetch_.emplace(std::move(*prefetch));
    }
  }
  if (!MayStartAtOnce() || lazy()) UNMOOR_TRY(Open());
  if (lazy()) UNMOOR_TRY(PrepareLazy());
  UNMOOR_ASSIGN(InterruptFd interrupt, InterruptFd::Create());
  UNMOOR_ASSIGN(TemporaryView view, TemporaryView::Named(MostDeltas() <= kDeltasInMemory));
  std::optional<WaitingAgent> agent;
  auto pidfd = Restore(view, agent, interrupt);
  if (!pidfd) {
    const auto why = agent ? agent->WhatFailed() : std::nullopt;
    const Error error = why ? Error(ErrorKind::kMachine, 0, *why) : pidfd.error();
    if (error.message().starts_with("criu")) view.KeepLog();
    agent.reset();  // it lets go of them first
    (void)BecomeSubreaper();
    KillDescendants();
    if (!opened_) return Failure(error);
    std::string message = error.message();
    if (message.find("File exists") != std::string::npos) {
      const std::string who = WhoTakesId(NeededIds());
      if (!who.empty()) message += "; " + who;
    }
    return Failure(Error(error.kind(), error.errnum(), message + "; nothing was restored"));
  }
  report_.elapsed = MonotonicNow() - begin;
  if (!options_.pidfile.empty()) {
    // The program runs: a missing pidfile is worth a warning, not its life.
    if (auto written = WriteFile(options_.pidfile, std::to_string(report_.root.value)); !written) {
      spdlog::warn("{}", written.error().message());
    }
  }
  return RestoredProgram(std::move(report_), *std::move(pidfd), std::move(interrupt));
}

}  // namespace

Result<std::optional<int>> RestoredProgram::WaitForRoot() {
  for (;;) {
    UNMOOR_ASSIGN(const WaitOutcome outcome,
                  WaitForExit(pidfd_.get(), Nanos(-1), interrupt_.get()));
    if (outcome == WaitOutcome::kExited) break;
    const int signal = interrupt_.Take();
    // In our own process group the terminal has told the program too: it decides.
    if (signal == SIGINT && ProcessGroup(report_.root) == ProcessGroup(Pid{0})) continue;
    if (signal != 0) return std::optional<int>();
  }
  interrupt_.TooLate();  // the Ctrl-C that ended the program may be pending for us still
  const std::optional<int> status = ReapChild(report_.root);
  if (!status)
    return std::optional<int>(0);  // somebody else's child: its status is not ours to know
  return std::optional<int>(WIFSIGNALED(*status) ? 128 + WTERMSIG(*status) : WEXITSTATUS(*status));
}

Result<RestoredProgram> Restore(const RestoreOptions& options, const RestoreObserver& observer) {
  return Restorer(options, observer).Run();
}

}  // namespace unmoor
