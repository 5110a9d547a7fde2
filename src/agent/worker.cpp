// The worker's life: into the program, running, watching, out again. See worker.h.
#include "agent/worker.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>

#include "agent/page_image.h"
#include "agent/worker_ops.h"
#include "base/fault_point.h"
#include "base/log.h"
#include "os/file.h"
#include "os/kernel_abi.h"
#include "os/pagemap.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/remote_memory.h"
#include "os/userfaultfd.h"

namespace unmoor {
namespace {

constexpr Nanos kStopLimit(5'000'000'000);
constexpr Nanos kSaveInterval(50'000'000);
constexpr int kExecCheckEvery = 10;          // looks at the program's events
constexpr Nanos kStopTogether(100'000'000);  // all threads at once, for injecting
constexpr Nanos kStopTogetherLate(500'000'000);
constexpr Nanos kLate(5'000'000'000);
constexpr Nanos kBorrowPatience(60'000'000'000);
constexpr Nanos kBorrowPause(5'000'000);
constexpr Nanos kAsidePatience(2'000'000'000);  // of whoever asks: hold_off.h

}  // namespace

Worker::Worker(Pid pid, const AgentOptions& options, OnFork on_fork, Legacy legacy)
    : pid_(pid),
      supervisor_(ParentPid()),
      stop_owner_(legacy.stop ? std::move(legacy.stop) : std::make_unique<ProgramStop>(pid)),
      stop_(*stop_owner_),
      options_(options),
      on_fork_(std::move(on_fork)),
      memory_room_(pid),
      dropped_(std::move(legacy.dropped)),
      unreplaced_(std::move(legacy.unreplaced)),
      cuts_(std::move(legacy.cuts)) {}

Result<> Worker::Identify() {
  UNMOOR_ASSIGN(const ProcessInfo process, ReadProcess(pid_));
  start_time_ = process.start_time;
  name_ = process.name;
  UNMOOR_ASSIGN(const ProcessInfo own, ReadProcess(OwnPid()));
  nested_ = process.ns_pids.size() > own.ns_pids.size();
  UNMOOR_ASSIGN(pidfd_, OpenPidFd(pid_));
  return {};
}

Failure AnotherAtWork(Pid pid) {
  return Failure(Error(ErrorKind::kMachine, EALREADY,
                       fmt::format("another agent is at work on process {}", pid.value)));
}

Result<bool> Worker::Begin(Fd old_uffd, bool inside) {
  old_uffd_ = std::move(old_uffd);
  UNMOOR_TRY(Identify());
  if (AnotherAgentIsAtWork()) {
    return AnotherAtWork(pid_);
  }
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadSmaps(pid_));
  const std::vector<Leftover> leftovers = FindLeftovers(pid_, vmas);
  UNMOOR_ASSIGN(const std::vector<HelperChild> helpers, FindHelpers(pid_));
  RememberImages(vmas);
  const bool mapped = std::ranges::any_of(vmas, MapsPageImage);
  if (!mapped && leftovers.empty() && helpers.empty() && !inside) return false;
  UNMOOR_TRY(RepeatWhileBusy([this](Nanos stop_limit) { return StopAndInject(stop_limit); }));
  // What an earlier worker found damaged is so still.
  const auto earlier = ReadProgress(pid_);
  const bool never = mapped && earlier && earlier->never;
  SaveProgress(never ? earlier->problem : "", never);
  return true;
}

Result<bool> Worker::BeginRestored() {
  UNMOOR_TRY(Identify());
  bool anything = false;
  UNMOOR_TRY(RepeatWhileBusy([&](Nanos stop_limit) -> Result<> {
    auto injected = StopAndInjectRestored(stop_limit);
    stop_.Release();
    if (!injected) return Failure(injected.error());
    anything = *injected;
    return {};
  }));
  return anything;
}

Result<bool> Worker::StopAndInjectRestored(Nanos stop_limit) {
  UNMOOR_TRY(stop_.Stop(stop_limit, {}));
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid_));
  RememberImages(vmas);
  const std::vector<Leftover> leftovers = FindLeftovers(pid_, vmas);
  if (images_.empty() && leftovers.empty()) return false;
  if (!leftovers.empty()) UNMOOR_TRY(RemoveHelperTraces(pid_, stop_.threads(), leftovers));
  UNMOOR_TRY(InjectStopped(vmas));
  return true;
}

// Should it fail, its addresses are known, and what it wished for them is read with the next plan.
void Worker::LearnFlags() {
  if (const auto vmas = ReadSmaps(pid_)) RememberImages(*vmas);
}

void WarmUpWorker() {
  (void)ReadSmaps(OwnPid());
  (void)ReadProcess(OwnPid());
  (void)ReadThreads(OwnPid());
}

// By the progress file, which a worker writes once it has begun. One of our own supervisor's is the
// one we replace.
bool Worker::AnotherAgentIsAtWork() const {
  const auto progress = ReadProgress(pid_);
  return progress && progress->supervisor != supervisor_ && progress->worker != OwnPid() &&
         AgentAtWork(*progress);
}

// The program's threads may be where they cannot be stopped (a vfork, a slow disk), or none of them
// may be fit to be borrowed just now; on a machine under load that can last.
Result<> Worker::RepeatWhileBusy(const std::function<Result<>(Nanos stop_limit)>& action) const {
  const Nanos began = MonotonicNow();
  for (;;) {
    const Nanos taken = MonotonicNow() - began;
    auto done = action(taken < kLate ? kStopTogether : kStopTogetherLate);
    if (done || done.error().errnum() != EAGAIN || taken > kBorrowPatience || program_ended()) {
      return done;
    }
    SleepFor(kBorrowPause);
  }
}

Result<> Worker::StopAndInject(Nanos stop_limit) {
  UNMOOR_TRY(WaitForEarlierHelpers());
  UNMOOR_TRY(KnowChildren());
  Result<> injected = stop_.Stop(stop_limit, [this] { return DrainOldEvents(); });
  if (injected) injected = ReplaceStopped();
  if (!injected) KeepAnswers();
  old_events_ = {};
  stop_.Release();
  return injected;
}

// Their threads believe to have given these ranges back, and are about to run: what can be done
// from outside.
void Worker::KeepAnswers() {
  for (const VaddrRange range : old_events_.given_back) (void)OverwriteImage(range);
  for (const VaddrRange range : old_events_.grown) (void)OverwriteImage(range);
}

// The events of before, for the sake of the threads that wait for one to be read, and only when no
// other thread is left that does not stop: what they say can be made true only once we are inside.
Result<bool> Worker::DrainOldEvents() {
  if (!old_uffd_.valid()) return false;
  UNMOOR_ASSIGN(const ThreadCalls calls, ReadThreadCalls(pid_));
  if (calls.stopped + calls.waiting_for_event() < calls.threads) return false;
  UNMOOR_TRY(KnowChildren());
  UNMOOR_ASSIGN(auto event, ReadUffdEvent(old_uffd_.get()));
  if (!event) return false;
  Collect(*event, calls, old_events_);
  bool changed = false;
  NoteEvent(*event, calls, changed);
  return true;
}

// Zeros in place of what an image shows in `range`, from outside; for when nothing of ours is
// inside the program. Every thread of it is stopped.
Result<> Worker::OverwriteImage(VaddrRange range) const {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid_));
  for (const VmaInfo& vma : vmas) {
    if (MapsPageImage(vma)) UNMOOR_TRY(WriteZeros(vma.range.Intersect(range)));
  }
  return {};
}

Result<> Worker::WriteZeros(VaddrRange range) const {
  const std::vector<std::byte> zeros(std::min(size_t{1} << 20, range.size().value));
  for (Vaddr at = range.begin; at < range.end;) {
    const auto part = std::span(zeros).first(std::min(zeros.size(), (range.end - at).value));
    UNMOOR_TRY(ForceWriteMemory(pid_, at, part));
    at = at + Bytes(part.size());
  }
  return {};
}

// With every thread of the program stopped, as InjectStopped.
Result<> Worker::ReplaceStopped() {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid_));
  UNMOOR_TRY(RemoveHelperTraces(pid_, stop_.threads(), FindLeftovers(pid_, vmas)));
  if (!old_events_.unexplained.empty()) UNMOOR_TRY(ExplainMoves(old_events_));
  UNMOOR_TRY(InjectStopped(vmas));
  for (const VaddrRange range : old_events_.given_back) UNMOOR_TRY(Drop(range));
  for (const VaddrRange range : old_events_.grown) UNMOOR_TRY(ZeroGrowth(range));
  for (const Vaddr end : old_events_.cut) cuts_.insert(end.value);
  UNMOOR_TRY(FindCuts());
  return ConvertCuts();
}

// Where VMAs were shortened before we came, by events that an earlier worker has read and could not
// answer any more: the index knows what would be seen if they grew again.
Result<> Worker::FindCuts() {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid_));
  for (size_t i = 0; i < vmas.size(); ++i) {
    const VmaInfo& vma = vmas[i];
    if (!IsKnownImage(vma)) continue;
    // More of the image, or what the program gave back of it: an event tells when that goes.
    if (i + 1 < vmas.size() && vmas[i + 1].range.begin == vma.range.end) continue;
    UNMOOR_ASSIGN(const ImageFile* file, FileOf(vma));
    if (file->check.MoreFollows(vma.offset + vma.range.size())) cuts_.insert(vma.range.end.value);
  }
  return {};
}

Result<> Worker::InjectStopped(std::span<const VmaInfo> vmas) {
  UNMOOR_ASSIGN(const HelperProcess helper, InjectHelper(pid_, stop_.threads(), vmas, nested_));
  known_children_.insert(helper.pid.value);
  OpList first;
  UNMOOR_ASSIGN(link_, HelperLink::Connect(pid_, helper, first));
  AddAdvice(first, {helper.region, helper.region + Bytes(helper::kRegionSize)}, MADV_DONTFORK);
  UNMOOR_TRY(OpenTrackers(first));
  if (options_.guard == GuardPolicy::kFault) guard_.Begin(pid_, helper, stop_.threads());
  return RegisterAreas(vmas);
}

// A helper whose worker died leaves by itself once its last list is done; one that does not is
// stuck in the kernel, and its end is what frees the program.
Result<> Worker::WaitForEarlierHelpers() const {
  const Nanos began = MonotonicNow();
  for (;;) {
    UNMOOR_ASSIGN(const std::vector<HelperChild> helpers, FindHelpers(pid_));
    if (std::ranges::all_of(helpers, &HelperChild::ended)) return {};
    if (AnotherAgentIsAtWork()) {
      return AnotherAtWork(pid_);
    }
    if (MonotonicNow() - began > kStopLimit) {
      for (const HelperChild& helper : helpers) (void)SendSignal(helper.pid, SIGKILL);
    }
    if (MonotonicNow() - began > kStopLimit + kStopLimit) {
      return MachineError("an earlier helper in process {} does not end", pid_.value);
    }
    SleepFor(Nanos(1'000'000));
  }
}

// In one message with what is to come `first`.
Result<> Worker::OpenTrackers(OpList& first) {
  const std::string proc = fmt::format("/proc/{}", pid_.value);
  UNMOOR_ASSIGN(pagemap_, OpenFile(proc + "/pagemap", O_RDONLY));
  UNMOOR_ASSIGN(maps_, OpenFile(proc + "/maps", O_RDONLY));
  UNMOOR_ASSIGN(memory_, OpenFile(proc + "/mem", O_RDONLY));
  UNMOOR_ASSIGN(tasks_, OpenFile(proc + "/task", O_RDONLY | O_DIRECTORY));
  // Userfaultfds are made inside the program, since they belong to the address space of their
  // maker.
  const size_t made_at = first.size();
  UNMOOR_CHECK(made_at + 2 <= helper::kReported);
  for (int i = 0; i < 2; ++i) {
    first.Syscall(SYS_userfaultfd, {O_CLOEXEC | O_NONBLOCK, 0, 0, 0, 0, 0}, true);
  }
  UNMOOR_ASSIGN(
      const helper::Reply reply,
      link_.RunGiving(first, std::array{pagemap_.get(), maps_.get(), memory_.get(), tasks_.get()}));
  if (reply.error != 0) return SystemError(reply.error, "the helper's first steps");
  helper_pagemap_ = reply.received_fds[0];
  helper_maps_ = reply.received_fds[1];
  helper_memory_ = reply.received_fds[2];
  helper_tasks_ = reply.received_fds[3];
  UNMOOR_ASSIGN(staging_, TakeUffd(reply.results[made_at], helper_staging_));
  can_move_ = FaultPoint("kernel.uffdio_move") &&
              UffdHandshake(staging_.get(), kernel::kUffdFeatureMove).has_value();
  if (!can_move_) spdlog::info("no UFFDIO_MOVE here: huge pages are collapsed in the mirror");
  if (old_uffd_.valid()) {
    // Of this address space already: kept, so that nothing is unwatched in between.
    uffd_ = std::move(old_uffd_);
    UNMOOR_ASSIGN(helper_uffd_, link_.GiveFd(uffd_.get()));
    return {};
  }
  UNMOOR_ASSIGN(uffd_, TakeUffd(reply.results[made_at + 1], helper_uffd_));
  return UffdHandshake(uffd_.get(), UffdEventFeatures());
}

// `made`: the helper's descriptor, or why it could not make one.
Result<Fd> Worker::TakeUffd(int64_t made, int& helper_fd) {
  if (made == -EPERM || made == -ENOSYS) {
    // The program may not; the device's opener decides, and that is us.
    UNMOOR_ASSIGN(const Fd device, OpenFile("/dev/userfaultfd", O_RDWR));
    UNMOOR_ASSIGN(const int helper_device, link_.GiveFd(device.get()));
    OpList by_device;
    by_device.Syscall(SYS_ioctl, {static_cast<uint64_t>(helper_device), USERFAULTFD_IOC_NEW,
                                  O_CLOEXEC | O_NONBLOCK, 0, 0, 0});
    UNMOOR_ASSIGN(made, link_.Must(by_device, "userfaultfd inside the program"));
  }
  if (made < 0) return SystemError(static_cast<int>(-made), "userfaultfd inside the program");
  helper_fd = static_cast<int>(made);
  return link_.TakeFd(helper_fd);
}

void Worker::RememberImages(std::span<const VmaInfo> vmas) {
  images_.clear();
  std::ranges::copy_if(vmas, std::back_inserter(images_), MapsPageImage);
}

Result<> Worker::RegisterAreas(std::span<const VmaInfo> vmas) {
  for (const VmaInfo& vma : vmas) {
    if (MapsPageImage(vma)) {
      UNMOOR_TRY(UffdRegister(uffd_.get(), vma.range, UffdMode::kWriteProtect));
    }
  }
  return {};
}

Result<> Worker::End() {
  staging_.Reset();
  link_.Close();
  UNMOOR_TRY(WaitForExit(link_.pidfd(), kStopLimit, -1));
  if (!program_ended()) {
    const auto removed =
        RepeatWhileBusy([this](Nanos stop_limit) { return RemoveTraces(stop_limit); });
    if (!removed && program_ended()) return {};
    UNMOOR_TRY(removed);
  }
  uffd_.Reset();
  const RemapReport done = report();
  spdlog::info("process {} is READY: {} remapped, {} given back, {} windows, longest pause {}",
               pid_.value, HumanBytes(done.done), HumanBytes(done.dropped), done.windows,
               HumanTime(done.longest_pause));
  SaveProgress("");  // finished once the supervisor has let go of it too
  return {};
}

Result<> Worker::StepAside() {
  // With no event left the program can be stopped without reading one, once the helper is gone.
  // Each hold in vain makes the next one longer.
  for (const Nanos began = MonotonicNow();;) {
    bool changed = false;
    const auto held = HandleEventsStopped(changed);
    if (held) break;
    const bool late = MonotonicNow() - began > kAsidePatience;
    if (held.error().errnum() != EAGAIN || late || program_ended()) return held;
    UNMOOR_TRY(HandleEvents());
    Pause(kBorrowPause);
  }
  staging_.Reset();
  link_.Close();
  UNMOOR_TRY(WaitForExit(link_.pidfd(), kStopLimit, -1));
  Result<> out = stop_.Stop(kStopTogether, [this]() -> Result<bool> {
    UNMOOR_ASSIGN(const bool waiting, WaitReadable(uffd_.get(), Nanos(0)));
    if (!waiting) return false;
    return SystemError(EAGAIN, "the program changed its memory at that moment");
  });
  if (out) {
    const auto leftovers = FindLeftovers(pid_);
    out = leftovers ? RemoveHelperTraces(pid_, stop_.threads(), *leftovers)
                    : Failure(leftovers.error());
  }
  stop_.Release();
  return out;
}

Result<> Worker::RemoveTraces(Nanos stop_limit) {
  const auto let_go = [&]() -> Result<bool> {
    // Nothing is to be watched any more; nobody may wait.
    UNMOOR_ASSIGN(const auto event, ReadUffdEvent(uffd_.get()));
    if (event) Collect(*event, {}, old_events_);
    return event.has_value();
  };
  Result<> removed = stop_.Stop(stop_limit, let_go);
  // Their threads are stopped, whoever else is not. Does nothing where no image is mapped.
  KeepAnswers();
  if (removed) removed = RemoveTracesStopped();
  old_events_ = {};
  stop_.Release();
  return removed;
}

// A list of mappings read while the program moves them about may miss what moves: the last look is
// with every thread stopped. EPIPE, as when a helper died, calls for another worker.
Result<> Worker::RemoveTracesStopped() {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid_));
  if (std::ranges::any_of(vmas, MapsPageImage)) {
    return SystemError(EPIPE, "the program moved memory as the remap ended");
  }
  return RemoveHelperTraces(pid_, stop_.threads(), FindLeftovers(pid_, vmas));
}

bool Worker::program_ended() const {
  const auto readable = WaitReadable(pidfd_.get(), Nanos(0));
  return !readable || *readable;
}

Result<> Worker::Run() {
  if (!remap_began_) remap_began_ = MonotonicNow();
  const bool huge = MayUseHugePages(options_.thp);
  Remapper remapper(*this, options_.max_pause, huge);
  auto result = remapper.Run([&](const RemapCounts& counts) {
    counts_ = counts;
    if (MonotonicNow() - last_saved_ > kSaveInterval) SaveProgress("");
  });
  if (remapper.counts().total.value > 0) counts_ = remapper.counts();
  if (result) result = DamageLeft();
  if (!result && (program_ended() || LeftAddressSpace())) return {};
  if (!result && result.error().errnum() != ECANCELED) {
    SaveProgress(result.error().message(), result.error().errnum() == EBADMSG);
  }
  return result;
}

// Of what could not be remapped because its image is damaged. It may have been given back since.
Result<> Worker::DamageLeft() const {
  if (refused_.empty()) return {};
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid_));
  const bool left = std::ranges::any_of(vmas, [&](const VmaInfo& vma) {
    return MapsPageImage(vma) && refused_.SizeWithin(vma.range).value > 0;
  });
  if (!left) return {};
  const std::string more = refusals_ > 1 ? fmt::format(" (and {} more)", refusals_ - 1) : "";
  return Failure(Error(ErrorKind::kUser, EBADMSG, damage_ + more));
}

// After an exec the helper is alone in the old address space: there is nothing left to remap.
bool Worker::LeftAddressSpace() const {
  const auto vmas = ReadMaps(pid_);
  return vmas && std::ranges::none_of(*vmas, [&](const VmaInfo& vma) {
           return vma.range.Contains(link_.helper().region);
         });
}

Result<> Worker::Watch(Nanos limit, const std::function<bool()>& stop) {
  const Nanos began = MonotonicNow();
  swap_next_ = false;
  for (int i = 1;
       !program_ended() && !stop() && (limit.value < 0 || MonotonicNow() - began < limit); ++i) {
    if (i % kExecCheckEvery == 0 && LeftAddressSpace()) return {};
    Pause(Nanos(20'000'000));
    stop_.Release();
    const auto handled = HandleEvents();
    if (!handled && program_ended()) return {};
    UNMOOR_TRY(handled);
  }
  return {};
}

RemapReport Worker::report() const {
  RemapReport report;
  report.total = counts_.total + converted_;
  report.done = counts_.done + converted_;
  report.dropped = dropped_bytes_;
  report.windows = counts_.windows;
  report.guarded = guard_.windows;
  report.aborted = counts_.aborted;
  report.longest_pause = std::max(counts_.longest_pause, longest_hold_);
  report.verified = verified_;
  if (remap_began_) report.elapsed = MonotonicNow() - *remap_began_;
  if (report.elapsed.value > 0) {
    report.copy_rate =
        static_cast<double>(report.done.value) * 1e9 / static_cast<double>(report.elapsed.value);
  }
  return report;
}

void Worker::SaveProgress(const std::string& problem, bool never) {
  // Its id may be another process's by now, restored a moment ago and with an agent of its own.
  if (program_ended()) return;
  last_saved_ = MonotonicNow();
  ProgressFile progress{pid_, start_time_, OwnPid(), supervisor_, false, problem, report()};
  progress.never = never;
  if (const auto saved = WriteProgress(progress); !saved) {
    spdlog::debug("{}", saved.error().message());
  }
}

}  // namespace unmoor
