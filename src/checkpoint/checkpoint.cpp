// See checkpoint.h.
#include "checkpoint/checkpoint.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "agent/known_image.h"
#include "agent/progress_file.h"
#include "base/fault_point.h"
#include "base/log.h"
#include "checkpoint/page_router.h"
#include "checkpoint/parent.h"
#include "checkpoint/still_mapped.h"
#include "checkpoint/write_ahead.h"
#include "criu/metadata.h"
#include "criu/rewrite.h"
#include "criu/runner.h"
#include "image/layout.h"
#include "image/pack.h"
#include "image/publisher.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/socket.h"

namespace unmoor {
namespace {

constexpr int kPageServerFd = 3;  // its number inside criu
constexpr int kTriesWhileMapped = 3;
constexpr int kTriesToFreeze = 50;

std::string Describe(Pid pid) {
  const auto info = ReadProcess(pid);
  return info ? fmt::format("{} ({})", pid.value, info->name) : fmt::format("{}", pid.value);
}

// `name`, or with a number behind it where there is such a thing: the data of an earlier failure.
std::string FreeName(const std::string& name) {
  constexpr int kTries = 1000;
  std::string free = name;
  for (int i = 2; Exists(free) && i < kTries; ++i) free = fmt::format("{}-{}", name, i);
  return free;
}

// frozen_time of stats-dump: the u32 0x55105940, the u32 0x57093306, a length, and a message whose
// field 1 is a message of varints; number 2 there is the frozen time in microseconds. Not worth a
// schema: what does not look like that is no figure.
Nanos FrozenTime(const std::string& criu_directory) {
  const auto text = ReadFile(criu_directory + "/stats-dump", Bytes(4096));
  if (!text || text->size() < 14 || (*text)[12] != '\x0a') return Nanos(0);
  size_t at = 14;
  const auto varint = [&]() {
    uint64_t value = 0;
    for (int shift = 0; at < text->size() && shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>((*text)[at++]);
      value |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) break;
    }
    return value;
  };
  constexpr uint64_t kFrozenTime = 2 << 3;
  while (at < text->size()) {
    const uint64_t key = varint();
    const uint64_t value = varint();
    if (key == kFrozenTime) return Nanos(static_cast<int64_t>(value) * 1000);
  }
  return Nanos(0);
}

// Until criu has detached from `pid`, with a bound in case it never does.
void WaitUntraced(Pid pid) {
  const Nanos end = MonotonicNow() + Nanos(30'000'000'000);
  while (MonotonicNow() < end) {
    const auto info = ReadProcess(pid);
    if (!info || info->tracer.value == 0) return;
    SleepFor(Nanos(1'000'000));
  }
}

bool HasEnded(Pid pid) {
  const auto info = ReadProcess(pid);
  return !info || info->ending();
}

// An agent of ours lets go by itself once the process is READY.
bool IsOurAgent(Pid tracer) {
  const auto info = ReadProcess(tracer);
  return info && info->name.starts_with("unmoor");
}

// RemapProcess with a time limit. Its thread may outlive the wait and owns all it touches; the
// agent goes on by itself anyway.
Result<> RemapWithin(Pid pid, Nanos timeout,
                     const std::function<void(const RemapReport&)>& progress,
                     const std::function<Result<>()>& go_on) {
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    std::optional<RemapReport> report;  // not told yet
    std::optional<Result<RemapReport>> result;
  };
  const auto shared = std::make_shared<Shared>();
  std::thread([shared, pid] {
    auto result = RemapProcess(pid, AgentOptions{}, [&](const RemapReport& report) {
      const std::lock_guard lock(shared->mutex);
      shared->report = report;
      shared->changed.notify_one();
    });
    const std::lock_guard lock(shared->mutex);
    shared->result = std::move(result);
    shared->changed.notify_one();
  }).detach();

  const Nanos end = MonotonicNow() + timeout;
  std::unique_lock lock(shared->mutex);
  while (!shared->result) {
    shared->changed.wait_for(lock, std::chrono::milliseconds(50));
    if (shared->report) progress(*std::exchange(shared->report, std::nullopt));
    UNMOOR_TRY(go_on());
    if (timeout.value >= 0 && MonotonicNow() > end) return {};  // the caller looks how far it came
  }
  if (!*shared->result) return Failure(shared->result->error());
  return {};
}

// Everything one dump needs to hand from step to step.
class Dumper {
 public:
  Dumper(const CheckpointOptions& options, const CheckpointObserver& observer)
      : options_(options), observer_(observer) {}

  [[nodiscard]] Result<CheckpointReport> Run();

 private:
  [[nodiscard]] Result<std::vector<HoldOff>> PutBackOnLayers();
  [[nodiscard]] Result<bool> DumpMapped(const criu::CriuBinary& criu);
  [[nodiscard]] Result<> DumpHeld(const criu::CriuBinary& criu);

  [[nodiscard]] Result<> CheckDirectory();
  [[nodiscard]] Result<> OpenParent();
  [[nodiscard]] Result<> PrepareDirectory();
  [[nodiscard]] Result<> GoOn();
  [[nodiscard]] bool IsIndependent() const;
  [[nodiscard]] Result<> WriteBeforeFreeze();
  [[nodiscard]] Result<> LinkParentLayers(const std::string& directory) const;
  [[nodiscard]] Result<> FinishRemap();
  [[nodiscard]] Result<> FinishRemapOf(Pid pid);
  [[nodiscard]] Bytes ExpectedBytes() const;
  [[nodiscard]] Result<> RunCriu(const criu::CriuBinary& criu, PageRouter& router);
  [[nodiscard]] criu::CriuCommand Command(int socket) const;
  [[nodiscard]] Result<Manifest> MakeManifest(const std::string& directory,
                                              const PageRouter& router) const;
  [[nodiscard]] Result<> MakeAnonymousAgain(const std::string& directory,
                                            const PageRouter& router) const;
  [[nodiscard]] Result<> Publish(const PageRouter& router);
  [[nodiscard]] bool IsNew(const ManifestLayer& layer, const PageRouter& router) const;
  void Pack(const std::string& directory, const ManifestLayer& layer);

  const CheckpointOptions& options_;
  const CheckpointObserver& observer_;
  CheckpointReport report_;
  std::optional<InterruptFd> interrupt_;  // from the moment there is something to clean up
  std::optional<Publisher> publisher_;
  std::optional<Parent> parent_;
  std::string layer_ahead_;  // id of the one written before the freeze
  std::vector<HoldOff> held_;
  std::vector<std::string> mapped_files_;  // CRIU's keys; the program is dumped as it is
  bool must_be_remapped_ = false;          // and could not be
  bool ill_frozen_ = false;                // so criu was sent away; once more
  bool stuck_ = false;
  std::string log_path_;
  std::string criu_version_;
};

Result<> Dumper::FinishRemapOf(Pid pid) {
  UNMOOR_ASSIGN(ProcessStatus status, QueryStatus(pid));
  if (status.status == Status::kReady) return {};
  if (status.status == Status::kNever) {
    return UserError("process {} cannot be checkpointed: {}", Describe(pid), status.reason);
  }
  report_.remapped_first = true;
  if (status.direct_mapped.value != 0) {
    spdlog::warn("process {} still maps {} of its image; finishing the remap first", Describe(pid),
                 HumanBytes(status.direct_mapped));
  } else {
    spdlog::warn("process {} is not ready yet ({}); waiting for that first", Describe(pid),
                 status.reason);
  }
  UNMOOR_TRY(RemapWithin(
      pid, options_.remap_timeout,
      [&](const RemapReport& progress) {
        if (observer_.remapping) observer_.remapping(pid, progress);
      },
      [this] { return GoOn(); }));
  UNMOOR_ASSIGN(status, QueryStatus(pid));
  if (status.status == Status::kReady) return {};
  return MachineError(
      "process {} is not independent of its image yet ({}); try again with a longer "
      "--timeout, or 'unmoor wait -t {}' first",
      Describe(pid), status.reason, pid.value);
}

// What is wrong with the directory is said before a remap is waited for.
Result<> Dumper::CheckDirectory() {
  UNMOOR_ASSIGN(const InterruptFd interrupt, InterruptFd::Create());
  return Publisher::Begin(options_.directory).map([](const Publisher&) {});
}

// One that was asked for must be usable; one we only know of is taken if it is.
Result<> Dumper::OpenParent() {
  if (options_.full) return {};
  if (options_.parent) {
    auto parent = Parent::Open(*options_.parent);
    if (!parent) {
      return Failure(Error(
          parent.error().kind(), parent.error().errnum(),
          fmt::format("{} (--prev-images-dir); nothing was touched", parent.error().message())));
    }
    parent_.emplace(*std::move(parent));
    return {};
  }
  const auto known = FindKnownImage(options_.pid);
  if (!known || !Exists(known->directory)) return {};
  auto parent = Parent::Open(known->directory);
  if (!parent) {
    spdlog::warn("{}; dumping in full", parent.error().message());
  } else if (parent->manifest().checkpoint_id == known->checkpoint_id) {
    parent_.emplace(*std::move(parent));
  }
  return {};
}

// Before the program is touched: a disk that is too small for copies fails the dump then.
Result<> Dumper::LinkParentLayers(const std::string& directory) const {
  if (!parent_) return {};
  bool told = false;
  for (const LayerReader& layer : parent_->layers()) {
    if (layer.id() == layer_ahead_) continue;
    UNMOOR_TRY(FaultPoint("dump.link"));
    const std::string pages = LayerPagesPath(directory, layer.id());
    UNMOOR_TRY(LinkOrCopyFile(layer.pages_fd().get(), pages));
    UNMOOR_TRY(LinkOrCopyFile(layer.index_fd().get(), LayerIndexPath(directory, layer.id())));
    UNMOOR_ASSIGN(const struct stat ours, Stat(pages));
    UNMOOR_ASSIGN(const struct stat theirs, StatFd(layer.pages_fd().get(), layer.pages_path()));
    if (ours.st_ino == theirs.st_ino && ours.st_dev == theirs.st_dev) continue;
    UNMOOR_TRY(SyncPath(pages));
    UNMOOR_TRY(SyncPath(LayerIndexPath(directory, layer.id())));
    if (!std::exchange(told, true)) {
      spdlog::warn("the layers of {} cannot be linked into {} and were copied",
                   parent_->directory(), options_.directory);
    }
  }
  return {};
}

// With the layer written ahead, if any, and nothing of an earlier try.
Result<> Dumper::PrepareDirectory() {
  if (!interrupt_) {
    UNMOOR_ASSIGN(InterruptFd interrupt, InterruptFd::Create());
    interrupt_.emplace(std::move(interrupt));
  }
  if (!publisher_) {
    UNMOOR_ASSIGN(Publisher publisher, Publisher::Begin(options_.directory));
    publisher_.emplace(std::move(publisher));
    UNMOOR_TRY(MakeDirectory(LayersDirectory(publisher_->path()), 0700));
  }
  UNMOOR_TRY(RemoveTree(CriuDirectory(publisher_->path())));
  const std::string layers = LayersDirectory(publisher_->path());
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(layers));
  for (const std::string& name : names) {
    const bool ahead = !layer_ahead_.empty() && name.starts_with(layer_ahead_);
    if (!ahead) UNMOOR_TRY(RemoveFile(layers + "/" + name));
  }
  return MakeDirectory(CriuDirectory(publisher_->path()), 0700);
}

Result<> Dumper::GoOn() {
  if (interrupt_ && interrupt_->Take() != 0) return MachineError("interrupted");
  return {};
}

bool Dumper::IsIndependent() const {
  const auto tree = ReadTree(options_.pid);
  return tree && std::ranges::all_of(*tree, [](Pid pid) {
           const auto status = QueryStatus(pid);
           return !status || status->status == Status::kReady;
         });
}

// What it wrote is a parent to the dump, and its layer part of the new checkpoint.
Result<> Dumper::WriteBeforeFreeze() {
  UNMOOR_TRY(PrepareDirectory());
  UNMOOR_ASSIGN(const std::vector<Pid> tree, ReadTree(options_.pid));
  WriteAheadOptions ahead;
  ahead.directory = publisher_->path();
  UNMOOR_ASSIGN(ahead.layer_id, NewId());
  ahead.most_rounds = options_.pre_dump_rounds;
  ahead.parent = parent_ ? &*parent_ : nullptr;
  ahead.plan = options_.plan;
  ahead.go_on = [this] { return GoOn(); };
  ahead.progress = observer_.writing_ahead;
  auto written = WriteAhead(tree, ahead);
  if (!written) {
    return Failure(Error(written.error().kind(), written.error().errnum(),
                         fmt::format("{}; nothing was written and process {} runs on",
                                     written.error().message(), Describe(options_.pid))));
  }
  if (!*written) return {};
  WrittenAhead& result = **written;
  layer_ahead_ = result.layer.id();
  report_.rounds = result.rounds;
  spdlog::debug("{} rounds before the freeze; {} differed in the last", result.rounds,
                HumanBytes(result.last_round));
  UNMOOR_ASSIGN(Parent parent,
                Parent::Over(std::exchange(parent_, std::nullopt), publisher_->path(),
                             std::move(result.layer), result.tasks));
  parent_.emplace(std::move(parent));
  return FaultPoint("dump.written_ahead");
}

Result<> Dumper::FinishRemap() {
  UNMOOR_ASSIGN(const std::vector<Pid> tree, ReadTree(options_.pid));
  for (const Pid pid : tree) {
    if (HasEnded(pid)) continue;
    const auto done = FinishRemapOf(pid);
    if (!done && pid != options_.pid && HasEnded(pid)) continue;  // a child that lived for a moment
    UNMOOR_TRY(done);
  }
  return {};
}

// Resident memory of the tree, for the progress bar only.
Bytes Dumper::ExpectedBytes() const {
  Bytes sum;
  const auto tree = ReadTree(options_.pid);
  if (!tree) return sum;
  for (const Pid pid : *tree) {
    const auto text = ReadFile(fmt::format("/proc/{}/status", pid.value));
    if (!text) continue;
    const size_t at = text->find("RssAnon:");
    if (at != std::string::npos)
      sum += Bytes(std::strtoull(text->c_str() + at + 8, nullptr, 10) << 10);
  }
  return sum;
}

criu::CriuCommand Dumper::Command(int socket) const {
  criu::CriuCommand command;
  command.args = {"dump",
                  "-t",
                  std::to_string(options_.pid.value),
                  "-D",
                  CriuDirectory(publisher_->path()),
                  "--page-server",
                  "--ps-socket",
                  std::to_string(kPageServerFd)};
  if (options_.leave_running) command.args.push_back("-R");
  if (options_.verbose) command.args.push_back("-v4");
  for (const std::string& file : mapped_files_) {
    command.args.insert(command.args.end(), {"--external", file});
  }
  command.args.insert(command.args.end(), options_.criu_arguments.begin(),
                      options_.criu_arguments.end());
  command.fds = {{socket, kPageServerFd}};
  for (const HoldOff& program : held_) {
    command.fds.push_back({program.inside(), kPageServerFd + static_cast<int>(command.fds.size())});
  }
  command.log_path = log_path_;
  return command;
}

Result<> Dumper::RunCriu(const criu::CriuBinary& criu, PageRouter& router) {
  UNMOOR_ASSIGN(StreamPair sockets, StreamPair::Create());
  criu::PageServer server(std::move(sockets.ours), router);
  Result<> served;
  std::thread serving([&] { served = server.Run(); });

  criu::CriuCommand command = Command(sockets.theirs.get());
  command.interrupt = &*interrupt_;
  bool interrupted = false;
  command.on_interrupt = [&] {
    interrupted = true;
    server.Abort("interrupted");
    // A second interrupt would kill criu, and with it perhaps the program: it is not listened to
    // until criu has let go of the program.
    sockets.theirs.Reset();
    serving.join();
    WaitUntraced(options_.pid);
  };
  // A thread asleep until its agent is back cannot be frozen, and criu touches nothing before all
  // are.
  if (!mapped_files_.empty()) {
    command.is_hopeless = [&] { return stuck_ = WaitsForAgent(held_); };
  }
  const auto outcome = criu::RunCriu(criu, command);
  sockets.theirs.Reset();
  if (serving.joinable()) serving.join();
  held_.clear();  // a program left running is its agent's again

  must_be_remapped_ = router.must_be_remapped();
  ill_frozen_ = router.ill_frozen();
  // What failed on our side is the cause; criu's failure is its echo.
  if (router.first_error()) return Failure(*router.first_error());
  if (outcome && outcome->status.ok() && served) return {};
  if (interrupted) return MachineError("interrupted");
  if (!outcome) return Failure(outcome.error());
  return served;
}

// The plan came from smaps, CRIU's metadata from CRIU's own look at the same frozen task.
Result<> CompareWithMetadata(const std::string& criu_directory, uint32_t vpid,
                             const RoutedTask& task) {
  UNMOOR_ASSIGN(const std::vector<criu::Vma> vmas, criu::ReadVmas(criu_directory, vpid));
  for (const PlannedVma& item : task.plan) {
    if (!item.mapped) continue;
    Vaddr covered = item.vma.range.begin;
    for (const criu::Vma& vma : vmas) {
      if (!vma.range.Overlaps(item.vma.range)) continue;
      const std::string_view why = criu::WhyNotTakeable(vma);
      if (!why.empty()) {
        return MachineError(
            "CRIU does not allow {} of task {} to be mapped: {}; please report this",
            item.vma.range, vpid, why);
      }
      if (vma.range.begin == covered && item.vma.range.Contains(vma.range)) covered = vma.range.end;
    }
    if (covered != item.vma.range.end) {
      return MachineError("CRIU and /proc/{}/smaps differ about {} of task {}; please report this",
                          task.pid.value, item.vma.range, vpid);
    }
  }
  return {};
}

ManifestVma Describe(const PlannedVma& item, Bytes saved) {
  ManifestVma vma;
  vma.range = item.vma.range;
  vma.prot = item.vma.prot;
  vma.flags = item.vma.vm_flags;
  vma.name = item.vma.name;
  vma.data = saved;
  vma.kind = item.mapped ? VmaKind::kMapped : saved > Bytes(0) ? VmaKind::kCriu : VmaKind::kNone;
  return vma;
}

// What the program took for anonymous memory, CRIU has for a mapping of a layer.
Result<> Dumper::MakeAnonymousAgain(const std::string& directory, const PageRouter& router) const {
  std::vector<criu::MappedTask> tasks;
  for (const auto& [vpid, task] : router.tasks()) {
    criu::MappedTask mapped{vpid, {}};
    for (const PlannedVma& item : task.plan) {
      if (!item.pieces.empty()) mapped.ranges.push_back(item.vma.range);
    }
    if (!mapped.ranges.empty()) tasks.push_back(std::move(mapped));
  }
  return criu::MakeAnonymousAgain(CriuDirectory(directory), tasks);
}

Result<Manifest> Dumper::MakeManifest(const std::string& directory,
                                      const PageRouter& router) const {
  UNMOOR_ASSIGN(const std::vector<criu::Task> tasks, criu::ReadTasks(CriuDirectory(directory)));
  UNMOOR_ASSIGN(const HostFacts host, ReadHostFacts());
  Manifest manifest;
  UNMOOR_ASSIGN(manifest.checkpoint_id, NewId());
  manifest.created = WallClockNow();
  manifest.tool_version = options_.tool_version;
  manifest.criu_version = criu_version_;
  manifest.kernel_release = host.kernel_release;
  manifest.page_size = host.page_size;
  manifest.cpu_features = host.cpu_features;
  manifest.root_vpid = tasks.front().vpid;
  if (parent_ && !parent_->is_no_checkpoint()) {
    manifest.parent_id = parent_->manifest().checkpoint_id;
  }
  for (const criu::Task& task : tasks) {
    ManifestTask entry;
    entry.vpid = task.vpid;
    entry.ppid = task.parent;
    entry.comm = task.name;
    entry.state = task.state_name();
    const auto routed = router.tasks().find(task.vpid);
    if (routed != router.tasks().end()) {
      UNMOOR_TRY(CompareWithMetadata(CriuDirectory(directory), task.vpid, routed->second));
      for (size_t i = 0; i < routed->second.plan.size(); ++i) {
        // CRIU's own, inside the program only while it is dumped.
        if (routed->second.plan[i].vma.name.starts_with("/memfd:CRIUMFD")) continue;
        entry.vmas.push_back(Describe(routed->second.plan[i], routed->second.saved[i]));
      }
    }
    manifest.tasks.push_back(std::move(entry));
  }
  if (router.layer()) UNMOOR_TRY(router.DescribeLayers(manifest, directory));
  // What of the new layers is used.
  manifest.written = Bytes(0);
  for (const ManifestLayer& layer : manifest.layers) {
    if (IsNew(layer, router)) *manifest.written += layer.data;
  }
  return manifest;
}

// What was linked or written and no VMA needs.
Result<> RemoveUnusedLayers(const Manifest& manifest, const std::string& directory) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(LayersDirectory(directory)));
  for (const std::string& name : names) {
    const std::string id = name.substr(0, name.find('.'));
    if (std::ranges::find(manifest.layers, id, &ManifestLayer::id) != manifest.layers.end()) {
      continue;
    }
    UNMOOR_TRY(RemoveFile(LayersDirectory(directory) + "/" + name));
  }
  return {};
}

// Behind the dump, so that the program is not frozen for it. What cannot be packed is published as
// it is: the program may be gone, and this all there is of it.
void Dumper::Pack(const std::string& directory, const ManifestLayer& layer) {
  const auto packed = PackLayerIn(directory, layer, *options_.compression, observer_.packing);
  if (packed) {
    report_.packed = report_.packed.value_or(Bytes(0)) + *packed;
  } else {
    spdlog::warn("{}; the image is complete, but not packed", packed.error().message());
  }
}

bool Dumper::IsNew(const ManifestLayer& layer, const PageRouter& router) const {
  return layer.id == layer_ahead_ || (router.layer() && layer.id == router.layer()->id);
}

Result<> Dumper::Publish(const PageRouter& router) {
  const std::string& directory = publisher_->path();
  UNMOOR_TRY(MakeAnonymousAgain(directory, router));
  UNMOOR_ASSIGN(report_.manifest, MakeManifest(directory, router));
  UNMOOR_TRY(RemoveUnusedLayers(report_.manifest, directory));
  UNMOOR_TRY(WriteManifest(directory, report_.manifest));
  report_.written = *report_.manifest.written;
  for (const ManifestLayer& layer : report_.manifest.layers) {
    if (!IsNew(layer, router)) {
      report_.parent = parent_->directory();
    } else if (options_.compression) {
      Pack(directory, layer);
    }
  }
  if (parent_ && !parent_->is_no_checkpoint() && !report_.parent) {
    spdlog::warn("nothing of {} was of use; dumped in full", parent_->directory());
  }
  return publisher_->Publish();
}

Result<CheckpointReport> Dumper::Run() {
  const Nanos begin = MonotonicNow();
  UNMOOR_TRY(CheckDumpable(options_.pid));
  UNMOOR_ASSIGN(const criu::CriuBinary criu,
                criu::FindCriu(options_.criu, criu::VersionCheck::kNow));
  if (criu.version) criu_version_ = criu::ToString(*criu.version);
  UNMOOR_TRY(CheckDirectory());
  UNMOOR_TRY(OpenParent());
  // Of a program that still maps its image, what it has written since is known.
  const bool writes_ahead = options_.pre_dump_rounds > 0;
  if (writes_ahead && IsIndependent()) UNMOOR_TRY(WriteBeforeFreeze());
  UNMOOR_ASSIGN(bool dumped, DumpMapped(criu));
  if (!dumped) {
    UNMOOR_TRY(FinishRemap());
    if (writes_ahead && layer_ahead_.empty()) {
      UNMOOR_TRY(WriteBeforeFreeze());
      UNMOOR_ASSIGN(dumped, DumpMapped(criu));
      if (!dumped) UNMOOR_TRY(FinishRemap());
    }
  }
  for (int i = 1; !dumped; ++i) {
    UNMOOR_ASSIGN(held_, HoldTree(options_.pid));
    const auto done = DumpHeld(criu);
    if (!done && !(ill_frozen_ && i < kTriesToFreeze)) return Failure(done.error());
    dumped = done.has_value();
  }
  report_.elapsed = MonotonicNow() - begin;
  if (options_.leave_running) {
    ForgetEndedProcesses();
    RememberImage({&options_.pid, 1}, {report_.directory, report_.manifest.checkpoint_id});
  }
  return std::move(report_);
}

// The agents leave as soon as they have put back what they can: the programs are asked for.
Result<std::vector<HoldOff>> Dumper::PutBackOnLayers() {
  std::vector<HoldOff> asked;
  if (!options_.track_mem && layer_ahead_.empty()) return asked;
  UNMOOR_ASSIGN(asked, AskForTree(options_.pid));
  UNMOOR_ASSIGN(const std::vector<PutBackTask> tasks,
                FindShownByParent(asked, *parent_, options_.plan));
  if (tasks.empty()) return asked;
  if (const auto done = PutBack(tasks, AgentOptions{}); !done) {
    spdlog::warn("{}; what could not be compared beforehand is read", done.error().message());
  }
  return asked;
}

// False: not possible, the remap is to be finished first. Why is said, and then nothing was done.
Result<bool> Dumper::DumpMapped(const criu::CriuBinary& criu) {
  const bool wanted = options_.while_mapped || options_.track_mem || options_.pre_dump_rounds > 0;
  if (!wanted || !parent_) return false;
  const auto not_possible = [this](const std::string& why) {
    held_.clear();
    mapped_files_.clear();
    spdlog::warn("{}", why);
    return false;
  };
  for (int i = 0; i < (ill_frozen_ ? kTriesToFreeze : kTriesWhileMapped); ++i) {
    UNMOOR_ASSIGN(std::vector<HoldOff> asked, PutBackOnLayers());
    auto held = HoldTree(options_.pid, std::move(asked));
    if (!held && held.error().errnum() == EAGAIN) return not_possible(held.error().message());
    if (!held) return Failure(held.error());
    held_ = *std::move(held);
    UNMOOR_ASSIGN(StillMapped mapped, FindStillMapped(held_, *parent_));
    if (!mapped.why_not.empty()) return not_possible(mapped.why_not);
    mapped_files_ = std::move(mapped.files);
    must_be_remapped_ = stuck_ = false;
    const auto dumped = DumpHeld(criu);
    if (dumped) return true;
    if (must_be_remapped_) return not_possible(dumped.error().message());
    const bool once_more = stuck_ || (ill_frozen_ && i + 1 < kTriesToFreeze);
    if (!once_more) return Failure(dumped.error());
  }
  return not_possible(
      fmt::format("process {} gives memory back all the time, so it cannot be frozen while mapped",
                  Describe(options_.pid)));
}

Result<> Dumper::DumpHeld(const criu::CriuBinary& criu) {
  ill_frozen_ = false;
  UNMOOR_TRY(CheckUntraced(options_.pid, Nanos(5'000'000'000)));
  UNMOOR_TRY(PrepareDirectory());
  const std::string directory = publisher_->path();
  UNMOOR_TRY(LinkParentLayers(directory));
  const char* const temporary = std::getenv("TMPDIR");
  UNMOOR_ASSIGN(const std::string log_directory,
                MakeTemporaryDirectory(temporary != nullptr ? temporary : "/tmp", "unmoor-dump-"));
  log_path_ = log_directory + "/criu.log";

  PageRouter::Options routing;
  routing.root = options_.pid;
  routing.criu_directory = CriuDirectory(directory);
  routing.layers_directory = LayersDirectory(directory);
  UNMOOR_ASSIGN(routing.layer_id, NewId());
  routing.sync = !options_.leave_running;
  routing.plan = options_.plan;
  if (parent_) routing.parent = &*parent_;
  routing.still_mapped = !mapped_files_.empty();
  if (observer_.dumping) {
    routing.progress = [this, expected = ExpectedBytes()](Bytes done) {
      observer_.dumping(done, std::max(done, expected));
    };
  }
  PageRouter router(std::move(routing));

  auto dumped = RunCriu(criu, router);
  if (dumped) dumped = router.Complete();
  if (!dumped) {
    const Error& error = dumped.error();
    const bool named = error.message().find(log_path_) != std::string::npos;
    if (!named || stuck_) (void)RemoveTree(log_directory);
    if (layer_ahead_.empty()) publisher_.reset();
    return Failure(Error(error.kind(), error.errnum(),
                         fmt::format("{}; nothing was written and process {} runs on",
                                     error.message(), Describe(options_.pid))));
  }
  if (options_.verbose) {
    (void)CopyFile(log_path_, CriuDirectory(directory) + "/dump.log");
  }
  (void)RemoveTree(log_directory);

  interrupt_->TooLate();
  if (auto published = Publish(router); !published) {
    if (options_.leave_running) {
      return Failure(Error(published.error().kind(), published.error().errnum(),
                           fmt::format("{}; nothing was written and process {} runs on",
                                       published.error().message(), Describe(options_.pid))));
    }
    // The program is gone: what was written is all there is of it.
    const std::string saved = FreeName(options_.directory + ".unpublished");
    if (!Exists(directory) || !Rename(directory, saved)) return Failure(published.error());
    return MachineError("{}; the program has ended, its complete data is kept in {}",
                        published.error().message(), saved);
  }
  report_.directory = publisher_->target();
  report_.frozen = FrozenTime(CriuDirectory(report_.directory));
  for (const ManifestLayer& layer : report_.manifest.layers) {
    if (!IsPackedLayer(report_.directory, layer.id)) report_.allocated += layer.allocated;
  }
  report_.allocated += report_.packed.value_or(Bytes(0)) + router.criu_bytes();
  report_.read = router.received();
  report_.still_mapped = !mapped_files_.empty();
  return {};
}

}  // namespace

Result<> CheckDumpable(Pid pid) {
  const auto info = ReadProcess(pid);
  if (!info) return UserError("there is no process {}", pid.value);
  if (info->pid != pid) {
    return UserError("{} is a thread of process {}; dump the process", pid.value, info->pid.value);
  }
  if (info->kernel_thread) {
    return UserError("process {} is a kernel thread; only programs can be dumped", Describe(pid));
  }
  if (info->ended()) {
    return UserError("process {} has ended already and waits for its parent {} (a zombie)",
                     Describe(pid), info->parent.value);
  }
  UNMOOR_ASSIGN(const std::vector<Pid> tree, ReadTree(pid));
  if (std::ranges::find(tree, OwnPid()) != tree.end()) {
    return UserError(
        "process {} started this command, so it cannot be frozen by it; run unmoor "
        "from elsewhere",
        Describe(pid));
  }
  return {};
}

Result<> CheckUntraced(Pid pid, Nanos patience) {
  UNMOOR_ASSIGN(const std::vector<Pid> tree, ReadTree(pid));
  const Nanos end = MonotonicNow() + patience;
  for (const Pid member : tree) {
    const auto threads = ReadThreads(member);
    if (!threads) continue;  // it has ended
    for (const Pid thread : *threads) {
      for (;;) {
        const auto state = ReadProcess(thread);
        if (!state || state->tracer.value == 0) break;
        if (!IsOurAgent(state->tracer)) {
          return UserError("process {} is traced by {}; end that first (a debugger, strace?)",
                           Describe(member), Describe(state->tracer));
        }
        if (MonotonicNow() > end) {
          return MachineError("process {} is still held by {}; try again, or 'unmoor wait -t {}'",
                              Describe(member), Describe(state->tracer), member.value);
        }
        SleepFor(Nanos(2'000'000));
      }
    }
  }
  return {};
}

Result<CheckpointReport> Dump(const CheckpointOptions& options,
                              const CheckpointObserver& observer) {
  return Dumper(options, observer).Run();
}

Result<std::vector<DryRunTask>> PlanDump(const CheckpointOptions& options) {
  UNMOOR_TRY(CheckDumpable(options.pid));
  UNMOOR_ASSIGN(const std::vector<Pid> tree, ReadTree(options.pid));
  std::vector<DryRunTask> tasks;
  for (const Pid pid : tree) {
    const auto info = ReadProcess(pid);
    const auto vmas = ReadSmaps(pid);
    if (!info || !vmas) continue;
    tasks.push_back({pid, info->name, PlanTask(*vmas, options.plan)});
  }
  return tasks;
}

}  // namespace unmoor
