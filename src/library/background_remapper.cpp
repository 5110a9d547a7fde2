// BackgroundRemapper: threads that each run the batch state machine over a part of the ranges,
// their pace, and what becomes of them. See include/unmoor/background_remapper.h.
//
//   running ─ error (memory, pinned, a thread that won't rest) → standing ─ Resume, FinishNow →
//   running
//      │ Pause → waits in the gate ─ Resume → running
//      ↓ nothing left, or Cancel
//   ended (the last thread to end reports completion)
//
// `mutex_` guards all state; the gate, called between copies, is where threads wait.
#include "unmoor/background_remapper.h"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "library/mapped_pieces.h"
#include "library/status_from.h"
#include "os/file.h"
#include "os/own_process.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "remap/local/fault_guard.h"
#include "remap/local/local_carrier.h"
#include "remap/page_image.h"
#include "remap/remapper.h"

namespace unmoor {
inline namespace v1 {
namespace {

constexpr Nanos kTryPinnedAgain(1'000'000'000);
constexpr int kMaxThreads = 64;

VaddrRange RangeOf(MemoryRange memory) {
  const Vaddr begin(reinterpret_cast<uint64_t>(memory.begin));  // SAFETY: an address, not accessed
  return {begin, begin + Bytes(memory.size)};
}

bool SystemHasHugePages() {
  const auto text = ReadFile("/sys/kernel/mm/transparent_hugepage/enabled");
  return text && text->find("[never]") == std::string::npos;
}

Status CheckRanges(std::span<const RemapRange> ranges) {
  std::vector<VaddrRange> sorted;
  for (const RemapRange& range : ranges) {
    const VaddrRange memory = RangeOf(range.memory);
    if (memory.begin.value % kPageSize != 0 || range.memory.size % kPageSize != 0 ||
        range.memory.size == 0 || memory.end < memory.begin) {
      return MakeStatus(StatusCode::kInvalidArgument, "memory {} is empty or not page-aligned",
                        memory);
    }
    sorted.push_back(memory);
  }
  std::ranges::sort(sorted);
  for (size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i - 1].Overlaps(sorted[i])) {
      return MakeStatus(StatusCode::kInvalidArgument, "memory {} and {} overlap", sorted[i - 1],
                        sorted[i]);
    }
  }
  return {};
}

Status CheckOptions(const RemapOptions& options) {
  if (options.threads < 1 || options.threads > kMaxThreads) {
    return MakeStatus(StatusCode::kInvalidArgument, "{} threads: 1 to {} are allowed",
                      options.threads, kMaxThreads);
  }
  if (!(options.cpu_share > 0 && options.cpu_share <= 1)) {
    return MakeStatus(StatusCode::kInvalidArgument, "cpu_share {} is not in (0, 1]",
                      options.cpu_share);
  }
  if (options.max_pause <= std::chrono::nanoseconds(0)) {
    return Status(StatusCode::kInvalidArgument, "max_pause must be positive");
  }
  if (options.freeze_signal < 0 || options.freeze_signal > 64) {
    return MakeStatus(StatusCode::kInvalidArgument, "there is no signal {}", options.freeze_signal);
  }
  return {};
}

// The ranges, in their order, in `count` parts of about the same size, cut at multiples of 2 MiB.
std::vector<std::vector<local::ScopeRange>> Split(const std::vector<local::ScopeRange>& ranges,
                                                  size_t count) {
  uint64_t total = 0;
  for (const local::ScopeRange& range : ranges) total += range.memory.size().value;
  const uint64_t share = AlignUp(total / count + 1, kHugePageSize);
  std::vector<std::vector<local::ScopeRange>> parts(1);
  uint64_t filled = 0;
  for (local::ScopeRange rest : ranges) {
    while (!rest.memory.empty()) {
      if (filled >= share && parts.size() < count) {
        parts.emplace_back();
        filled = 0;
      }
      const uint64_t wanted = parts.size() < count ? share - filled : ~uint64_t{0};
      Vaddr end = rest.memory.end;
      if (wanted < rest.memory.size().value) {
        end =
            std::min(end, Vaddr(AlignUp((rest.memory.begin + Bytes(wanted)).value, kHugePageSize)));
      }
      parts.back().push_back({{rest.memory.begin, end}, rest.guarded});
      filled += (end - rest.memory.begin).value;
      rest.memory.begin = end;
    }
  }
  return parts;
}

Result<> Cancelled() {
  return Failure(Error(ErrorKind::kMachine, ECANCELED, "cancelled"));
}

local::CopyOrder OrderOf(RemapOrder order) {
  switch (order) {
    case RemapOrder::kSequential:
      return local::CopyOrder::kSequential;
    case RemapOrder::kHotFirst:
      return local::CopyOrder::kHotFirst;
    case RemapOrder::kGiven:
      break;
  }
  return local::CopyOrder::kGiven;
}

}  // namespace

class BackgroundRemapper::Impl {
 public:
  Impl(std::shared_ptr<local::Watcher> watcher, std::vector<local::ScopeRange> ranges,
       std::vector<local::ImageSource> sources, const RemapOptions& options)
      : owner_(OwnPid()),
        options_(options),
        ranges_(std::move(ranges)),
        watcher_(std::move(watcher)),
        guard_before_(local::ReadGuardCounts()) {
    share_ =
        std::make_shared<local::RemapShare>(watcher_, ranges_, std::move(sources), options.verify);
  }
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  [[nodiscard]] Result<> WatchScope() { return share_->WatchScope(); }
  [[nodiscard]] Result<> Begin();
  [[nodiscard]] bool IsOfThisProcess() const { return OwnPid() == owner_; }
  [[nodiscard]] RemapProgress progress() const;
  Status Wait(std::chrono::nanoseconds timeout);
  void Pause();
  void Resume(bool without_pace);
  void Cancel();

 private:
  struct Worker {
    std::thread thread;
    RemapCounts counts;   // of its Remapper now
    RemapCounts earlier;  // of those before
    Nanos longest_guard;
    bool standing = false;
    bool part_done = false;
    bool ended = false;
    Nanos paced_until;  // of the bytes copied so far
    Nanos cpu_mark;     // thread time when last slept for the share
    Nanos clock_mark;
  };

  void RunWorker(Worker& worker, const std::vector<local::ScopeRange>& scope);
  [[nodiscard]] Result<> RunScope(Worker& worker, const std::vector<local::ScopeRange>& scope);
  [[nodiscard]] Result<> RunOnce(Worker& worker, local::LocalCarrier& carrier);
  [[nodiscard]] Result<> RunLeftBehind(Worker& worker);
  [[nodiscard]] bool IsLast(Worker& worker);
  [[nodiscard]] bool StandUntilResumed(Worker& worker, const Error& error);
  [[nodiscard]] Result<> Gate(Worker& worker, Bytes copied);
  [[nodiscard]] Nanos TimeToSleep(Worker& worker, Bytes copied);
  void EndWorker(Worker& worker);
  void LetGo();
  [[nodiscard]] RemapStatus StatusLocked() const;
  [[nodiscard]] bool AllStandOrEnded() const;

  const Pid owner_;
  RemapOptions options_;
  const std::vector<local::ScopeRange> ranges_;
  std::shared_ptr<local::Watcher> watcher_;
  std::shared_ptr<local::RemapShare> share_;
  const local::GuardCounts guard_before_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Worker>> workers_;
  bool paused_ = false;
  bool paced_ = true;
  bool cancelled_ = false;
  bool ended_ = false;
  bool reported_ = false;
  uint64_t resumes_ = 0;
  Error standing_{ErrorKind::kMachine, 0, ""};
  RemapStatus final_ = RemapStatus::kLater;
  std::string refusal_;
  uint64_t refused_bytes_ = 0;
};

// A failure leaves it cancelled, and reports to nobody.
Result<> BackgroundRemapper::Impl::Begin() {
  auto parts = Split(ranges_, static_cast<size_t>(options_.threads));
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < parts.size(); ++i) workers_.push_back(std::make_unique<Worker>());
  for (size_t i = 0; i < parts.size(); ++i) {
    Worker& worker = *workers_[i];
    auto started = local::StartEngineThread(
        "unmoor-remap", [this, &worker, scope = std::move(parts[i])] { RunWorker(worker, scope); });
    if (!started) {
      workers_.resize(i);
      cancelled_ = true;
      options_.completion_eventfd = -1;
      options_.on_complete = nullptr;
      return Failure(started.error());
    }
    worker.thread = std::move(*started);
  }
  return {};
}

BackgroundRemapper::Impl::~Impl() {
  if (!IsOfThisProcess()) {
    // The threads stayed in the parent; what they hold is leaked, as nobody can end them here.
    for (auto& worker : workers_) (void)worker.release();
    new std::shared_ptr<local::RemapShare>(std::move(share_));
    new std::shared_ptr<local::Watcher>(std::move(watcher_));
    return;
  }
  Cancel();
  for (const auto& worker : workers_) {
    if (worker->thread.joinable()) worker->thread.join();
  }
  LetGo();
}

void BackgroundRemapper::Impl::RunWorker(Worker& worker,
                                         const std::vector<local::ScopeRange>& scope) {
  Result<> result = RunScope(worker, scope);
  while (result && IsLast(worker)) {
    result = RunLeftBehind(worker);
    if (result || result.error().errnum() == ECANCELED) break;
    if (StandUntilResumed(worker, result.error())) result = {};
  }
  EndWorker(worker);
}

// Until done; fails only with ECANCELED.
Result<> BackgroundRemapper::Impl::RunScope(Worker& worker,
                                            const std::vector<local::ScopeRange>& scope) {
  local::LocalOptions options;
  options.max_pause = Nanos(options_.max_pause.count());
  options.order = OrderOf(options_.order);
  options.verify = options_.verify;
  options.gate = [this, &worker](Bytes copied) { return Gate(worker, copied); };
  local::LocalCarrier carrier(share_, scope, std::move(options));
  for (;;) {
    auto result = RunOnce(worker, carrier);
    if (result || result.error().errnum() == ECANCELED) return result;
    if (!StandUntilResumed(worker, result.error())) {
      return Cancelled();
    }
  }
}

// What the program moved while the plans were read, perhaps out of one worker's part and back once
// that had ended.
Result<> BackgroundRemapper::Impl::RunLeftBehind(Worker& worker) {
  for (;;) {
    UNMOOR_ASSIGN(const std::vector<VaddrRange> left, share_->FindMapped());
    if (left.empty()) return {};
    std::vector<local::ScopeRange> scope;
    for (const VaddrRange range : left) scope.push_back({range, false});
    UNMOOR_TRY(RunScope(worker, scope));
  }
}

// Whether every other worker has done its part.
bool BackgroundRemapper::Impl::IsLast(Worker& worker) {
  const std::lock_guard lock(mutex_);
  worker.part_done = true;
  return std::ranges::all_of(workers_, [](const auto& w) { return w->part_done || w->ended; });
}

Result<> BackgroundRemapper::Impl::RunOnce(Worker& worker, local::LocalCarrier& carrier) {
  Remapper remapper(carrier, Nanos(options_.max_pause.count()),
                    options_.huge_pages && SystemHasHugePages());
  const auto note = [&](const RemapCounts& counts) {
    const std::lock_guard lock(mutex_);
    worker.counts = counts;
    worker.longest_guard = carrier.longest_guard();
  };
  const auto result = remapper.Run(note);
  note(remapper.counts());
  const std::lock_guard lock(mutex_);
  RemapCounts& all = worker.earlier;
  all.done += worker.counts.done;
  all.windows += worker.counts.windows;
  all.aborted += worker.counts.aborted;
  all.longest_pause = std::max(all.longest_pause, worker.counts.longest_pause);
  all.total = all.done + (worker.counts.total - worker.counts.done);
  worker.counts = RemapCounts();
  return result;
}

// False: cancelled. What lacked may come back by itself where the process holds it (a ring, a
// thread); memory and mappings are asked for again only when somebody says so.
bool BackgroundRemapper::Impl::StandUntilResumed(Worker& worker, const Error& error) {
  std::unique_lock lock(mutex_);
  worker.standing = true;
  standing_ = error;
  changed_.notify_all();
  const uint64_t seen = resumes_;
  const auto asked = [&] { return cancelled_ || resumes_ != seen; };
  if (error.errnum() == EBUSY) {
    changed_.wait_for(lock, std::chrono::nanoseconds(kTryPinnedAgain.value), asked);
  } else {
    changed_.wait(lock, asked);
  }
  worker.standing = false;
  return !cancelled_;
}

Result<> BackgroundRemapper::Impl::Gate(Worker& worker, Bytes copied) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return cancelled_ || !paused_; });
  if (cancelled_) return Cancelled();
  const Nanos sleep = TimeToSleep(worker, copied);
  if (sleep.value > 0) {
    changed_.wait_for(lock, std::chrono::nanoseconds(sleep.value),
                      [&] { return cancelled_ || !paced_; });
  }
  worker.clock_mark = MonotonicNow();
  worker.cpu_mark = ThreadCpuTime();
  return cancelled_ ? Cancelled() : Result<>();
}

Nanos BackgroundRemapper::Impl::TimeToSleep(Worker& worker, Bytes copied) {
  if (!paced_ || copied.value == 0) return Nanos(0);
  const Nanos now = MonotonicNow();
  int64_t sleep = 0;
  if (options_.bytes_per_second > 0) {
    const double rate =
        static_cast<double>(options_.bytes_per_second) / static_cast<double>(workers_.size());
    const auto cost = static_cast<int64_t>(static_cast<double>(copied.value) / rate * 1e9);
    worker.paced_until = Nanos(std::max(worker.paced_until.value, now.value) + cost);
    sleep = worker.paced_until.value - now.value;
  }
  if (options_.cpu_share < 1 && worker.clock_mark.value != 0) {
    const auto busy = static_cast<double>((ThreadCpuTime() - worker.cpu_mark).value);
    const auto whole = static_cast<int64_t>(busy / options_.cpu_share);
    sleep = std::max(sleep, whole - (now - worker.clock_mark).value);
  }
  return Nanos(sleep);
}

void BackgroundRemapper::Impl::EndWorker(Worker& worker) {
  std::unique_lock lock(mutex_);
  worker.ended = true;
  if (!std::ranges::all_of(workers_, [](const auto& w) { return w->ended; })) return;
  for (const local::ScopeRange& range : ranges_) {
    refused_bytes_ += share_->refused().SizeWithin(range.memory).value;
  }
  refusal_ = share_->refusal();
  final_ = refused_bytes_ > 0 ? RemapStatus::kNever
           : cancelled_       ? RemapStatus::kLater
                              : RemapStatus::kReady;
  ended_ = true;
  const RemapStatus status = final_;
  lock.unlock();
  // Nothing of ours is left where there is nothing left to watch.
  if (status == RemapStatus::kReady) LetGo();
  if (options_.completion_eventfd >= 0) SignalEventFd(options_.completion_eventfd);
  if (options_.on_complete) options_.on_complete(status);
  lock.lock();
  reported_ = true;
  changed_.notify_all();
}

void BackgroundRemapper::Impl::LetGo() {
  std::shared_ptr<local::RemapShare> share;
  std::shared_ptr<local::Watcher> watcher;
  {
    const std::lock_guard lock(mutex_);
    share = std::move(share_);
    watcher = std::move(watcher_);
  }
  if (!watcher) return;
  std::vector<VaddrRange> claimed;
  for (const local::ScopeRange& range : ranges_) claimed.push_back(range.memory);
  watcher->Disclaim(claimed);
}

RemapStatus BackgroundRemapper::Impl::StatusLocked() const {
  return ended_ ? final_ : RemapStatus::kLater;
}

bool BackgroundRemapper::Impl::AllStandOrEnded() const {
  return std::ranges::all_of(workers_, [](const auto& w) { return w->standing || w->ended; });
}

RemapProgress BackgroundRemapper::Impl::progress() const {
  RemapProgress progress;
  if (!IsOfThisProcess()) {
    progress.reason = "this process was forked: its remapper stayed behind; start a new one";
    return progress;
  }
  const std::lock_guard lock(mutex_);
  progress.status = StatusLocked();
  for (const auto& worker : workers_) {
    const RemapCounts& now = worker->counts;
    const RemapCounts& earlier = worker->earlier;
    progress.done_bytes += now.done.value + earlier.done.value;
    progress.total_bytes +=
        now.total.value == 0 ? earlier.total.value : earlier.done.value + now.total.value;
    progress.windows += now.windows + earlier.windows;
    progress.aborted += now.aborted + earlier.aborted;
    progress.longest_pause = std::max(
        progress.longest_pause,
        std::chrono::nanoseconds(std::max(now.longest_pause, earlier.longest_pause).value));
    progress.longest_guard =
        std::max(progress.longest_guard, std::chrono::nanoseconds(worker->longest_guard.value));
  }
  const local::GuardCounts guard = local::ReadGuardCounts();
  progress.faults_caught = guard.faults - guard_before_.faults;
  progress.writers_waited = std::chrono::nanoseconds(guard.waited_ns - guard_before_.waited_ns);
  progress.refused_bytes = refused_bytes_;
  if (ended_) {
    progress.reason = final_ == RemapStatus::kNever   ? refusal_
                      : final_ == RemapStatus::kLater ? "cancelled"
                                                      : "";
    return progress;
  }
  const bool standing = AllStandOrEnded();
  progress.running = !standing && !paused_ && !cancelled_;
  if (standing) progress.reason = standing_.message();
  if (!standing && paused_) progress.reason = "paused";
  return progress;
}

Status BackgroundRemapper::Impl::Wait(std::chrono::nanoseconds timeout) {
  if (!IsOfThisProcess()) return {StatusCode::kBusy, progress().reason};
  std::unique_lock lock(mutex_);
  const auto over = [&] { return reported_ || AllStandOrEnded(); };
  const auto settled = [&] { return reported_ || (over() && !ended_); };
  if (timeout < std::chrono::nanoseconds(0)) {
    changed_.wait(lock, settled);
  } else if (!changed_.wait_for(lock, timeout, settled)) {
    return MakeStatus(StatusCode::kTimedOut, "still direct-mapped after {}",
                      HumanTime(Nanos(timeout.count())));
  }
  if (!ended_) {
    const Status status = StatusFrom(standing_, StatusCode::kSystem);
    const bool busy = standing_.errnum() == EBUSY;
    return {busy ? StatusCode::kBusy : status.code(), standing_.message(), standing_.errnum()};
  }
  if (final_ == RemapStatus::kNever) return {StatusCode::kDamaged, refusal_};
  if (final_ == RemapStatus::kLater) return {StatusCode::kCancelled, "cancelled"};
  return {};
}

void BackgroundRemapper::Impl::Pause() {
  if (!IsOfThisProcess()) return;
  const std::lock_guard lock(mutex_);
  paused_ = true;
  changed_.notify_all();
}

void BackgroundRemapper::Impl::Resume(bool without_pace) {
  if (!IsOfThisProcess()) return;
  const std::lock_guard lock(mutex_);
  paused_ = false;
  ++resumes_;
  if (without_pace) paced_ = false;
  for (const auto& worker : workers_) worker->standing = false;
  changed_.notify_all();
}

void BackgroundRemapper::Impl::Cancel() {
  if (!IsOfThisProcess()) return;
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

// --- the public class ---------------------------------------------------------------------------

namespace {

StatusOr<std::shared_ptr<local::Watcher>> WatcherFor(const RemapOptions& options) {
  auto watcher = local::Watcher::Get(options.freeze_signal);
  if (watcher) return std::move(*watcher);
  const int errnum = watcher.error().errnum();
  const bool lacking = errnum == ENOSYS || errnum == EINVAL || errnum == ENOTTY;
  return Status(lacking ? StatusCode::kUnsupported : StatusFrom(watcher.error()).code(),
                watcher.error().message(), errnum);
}

}  // namespace

BackgroundRemapper::BackgroundRemapper(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
BackgroundRemapper::BackgroundRemapper(BackgroundRemapper&&) noexcept = default;
BackgroundRemapper& BackgroundRemapper::operator=(BackgroundRemapper&&) noexcept = default;
BackgroundRemapper::~BackgroundRemapper() = default;

StatusOr<BackgroundRemapper> BackgroundRemapper::StartWith(std::span<const RemapRange> ranges,
                                                           const DirectMap* map,
                                                           const RemapOptions& options) {
  if (Status status = CheckRanges(ranges); !status.ok()) return status;
  if (Status status = CheckOptions(options); !status.ok()) return status;
  std::vector<local::ImageSource> sources;
  if (map != nullptr) {
    for (const MappedPiece& piece : PiecesOf(*map)) {
      if (options.verify) UNMOOR_STATUS_TRY(piece.layer->LoadHashes());
      sources.push_back({piece.memory, piece.offset, {piece.layer, &piece.layer->reader()}});
    }
  }
  auto watcher = WatcherFor(options);
  if (!watcher.ok()) return watcher.status();
  std::vector<local::ScopeRange> scope;
  std::vector<VaddrRange> claim;
  for (const RemapRange& range : ranges) {
    const bool guarded = options.guard == Guard::kFault && !range.written_by_system_calls;
    scope.push_back({RangeOf(range.memory), guarded});
    claim.push_back(scope.back().memory);
  }
  if (!(*watcher)->Claim(claim)) {
    return Status(StatusCode::kInvalidArgument, "another remapper has part of these ranges");
  }
  auto impl =
      std::make_unique<Impl>(std::move(*watcher), std::move(scope), std::move(sources), options);
  // Memory given back behaves as on anonymous memory from the moment Start returns.
  for (int attempt = 0;; ++attempt) {
    const auto watched = impl->WatchScope();
    if (watched) break;
    const bool changed_meanwhile = watched.error().errnum() == EINVAL;
    if (!changed_meanwhile || attempt == 100) return StatusFrom(watched.error());
  }
  if (const auto begun = impl->Begin(); !begun) return StatusFrom(begun.error());
  return BackgroundRemapper(std::move(impl));
}

StatusOr<BackgroundRemapper> BackgroundRemapper::Start(std::span<const RemapRange> ranges,
                                                       const RemapOptions& options) {
  return StartWith(ranges, nullptr, options);
}

StatusOr<BackgroundRemapper> BackgroundRemapper::Start(const DirectMap& map,
                                                       const RemapOptions& options) {
  std::vector<RemapRange> ranges;
  for (const MappedRange& range : map.ranges()) ranges.push_back({range.memory});
  return StartWith(ranges, &map, options);
}

StatusOr<BackgroundRemapper> BackgroundRemapper::Start(const DirectMap& map,
                                                       std::span<const RemapRange> ranges,
                                                       const RemapOptions& options) {
  return StartWith(ranges, &map, options);
}

RemapProgress BackgroundRemapper::progress() const {
  return impl_->progress();
}
Status BackgroundRemapper::Wait(std::chrono::nanoseconds timeout) {
  return impl_->Wait(timeout);
}
void BackgroundRemapper::Pause() {
  impl_->Pause();
}
void BackgroundRemapper::Resume() {
  impl_->Resume(false);
}
void BackgroundRemapper::FinishNow() {
  impl_->Resume(true);
}
void BackgroundRemapper::Cancel() {
  impl_->Cancel();
}

StatusOr<ProcessStatus> QueryStatus() {
  auto vmas = ReadMaps(OwnPid());
  if (!vmas) return StatusFrom(vmas.error());
  ProcessStatus status;
  std::string name;
  for (const VmaInfo& vma : *vmas) {
    if (!MapsPageImage(vma)) continue;
    status.direct_mapped_bytes += vma.range.size().value;
    name = vma.name;
  }
  if (status.direct_mapped_bytes == 0) return status;
  status.reason = local::Watcher::Refusal();
  status.status = status.reason.empty() ? RemapStatus::kLater : RemapStatus::kNever;
  if (status.reason.empty()) {
    status.reason =
        fmt::format("{} still map {}", HumanBytes(Bytes(status.direct_mapped_bytes)), name);
  }
  return status;
}

}  // namespace v1
}  // namespace unmoor
