// See round.h.
#include "round.h"

#include <dirent.h>
#include <signal.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>

#include "arena.h"
#include "failure.h"
#include "unmoor/background_remapper.h"

extern char** environ;

namespace torture {
namespace {

using std::chrono::microseconds;
using unmoor::BackgroundRemapper;
using unmoor::RemapOptions;
using unmoor::RemapProgress;
using unmoor::RemapRange;
using unmoor::StatusCode;

constexpr uint64_t kStuckAfter = 60'000'000'000;
// Of this process's own processor time: on a machine that gives it little a remap takes its time.
constexpr uint64_t kRemapCpuTime = 4 * kStuckAfter;

uint64_t CpuNanos() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
}

size_t CountEntries(const char* directory) {
  DIR* dir = opendir(directory);
  if (dir == nullptr) Fail("%s: %s", directory, std::strerror(errno));
  size_t count = 0;
  while (const dirent* entry = readdir(dir)) count += entry->d_name[0] != '.' ? 1 : 0;
  closedir(dir);
  return count;
}

// A remapper of some of the ranges, and what became of it.
struct Remap {
  std::vector<RemapRange> ranges;
  RemapOptions options;
  std::optional<BackgroundRemapper> remapper;
  std::atomic<int> completions{0};
  bool done = false;

  void Start() {
    done = false;
    completions = 0;
    options.on_complete = [this](unmoor::RemapStatus) { ++completions; };
    auto started = BackgroundRemapper::Start(ranges, options);
    if (!started.ok()) Fail("remapper not started: %s", started.status().message().c_str());
    remapper.emplace(std::move(*started));
  }
};

class Round {
 public:
  Round(const Options& options, uint64_t number, const std::string& directory, int direct_file,
        Totals& totals)
      : options_(options),
        random_(options.seed * 1'000'003 + number),
        totals_(totals),
        directory_(directory),
        fault_(options.guard == "fault" || (options.guard == "any" && OneIn(random_, 2))),
        writer_count_(options.threads != 0 ? static_cast<size_t>(options.threads) : SomeThreads()),
        arena_(options, random_, number, writer_count_, fault_) {
    state_.options = &options;
    state_.tally = &totals.tally;
    state_.direct_file = direct_file;
    state_.crowded = writer_count_ > 8;
  }

  void Run() {
    const size_t fds = CountEntries("/proc/self/fd");
    const size_t threads = CountEntries("/proc/self/task");
    arena_.Build(directory_ + "/image");
    if (options_.verbose) Describe();
    // Until there is a remapper, giving back shows the image's bytes.
    pthread_rwlock_wrlock(&state_.watched);
    StartWriters();
    if (options_.remap_command.empty()) {
      RemapFromInside();
    } else {
      RemapFromOutside();
    }
    usleep(static_cast<useconds_t>(Below(random_, 5000)));
    StopWriters();
    CheckEnd();
    remaps_.clear();
    writers_.clear();
    if (OneIn(random_, 4) && options_.remap_command.empty()) {
      arena_.CheckpointAndCompare(directory_ + "/checkpoint");
      ++totals_.checkpoints;
    }
    arena_.Unmap();
    Leftovers(fds, threads);
    ++totals_.rounds;
  }

 private:
  size_t SomeThreads() {
    constexpr size_t kCounts[] = {1, 1, 2, 2, 3, 4, 6, 8, 16, 64};
    return kCounts[Below(random_, std::size(kCounts))];
  }

  void Describe() {
    uint64_t pages = 0;
    for (const ArenaRange& range : arena_.ranges()) pages += range.pages;
    std::fprintf(stderr, "round %llu: %zu writers, %zu ranges, %.1f MiB, %s guard\n",
                 (unsigned long long)totals_.rounds, writer_count_, arena_.ranges().size(),
                 static_cast<double>(pages) / 256, fault_ ? "fault" : "freeze");
  }

  void StartWriters() {
    for (size_t i = 0; i < writer_count_; ++i) {
      writers_.push_back(std::make_unique<Writer>(state_, arena_, i, random_()));
      writers_.back()->Start();
    }
    state_.begin = true;
    usleep(static_cast<useconds_t>(Below(random_, 3000)));
  }

  void StopWriters() {
    state_.stop = true;
    const uint64_t since = NowNanos();
    while (state_.ended.load() < static_cast<int>(writer_count_)) {
      if (NowNanos() - since > kStuckAfter) Fail("the writers do not come to their end");
      usleep(500);
    }
    state_.ended = -1;
    uint64_t operations = 0;
    for (auto& writer : writers_) {
      writer->Join();
      operations += writer->operations();
      added_ += writer->added();
    }
    totals_.tally.operations += operations;
  }

  // --- the library's remapper ---

  void MakeRemaps() {
    const size_t count = OneIn(random_, 3) ? 2 : 1;
    for (size_t i = 0; i < count; ++i) remaps_.push_back(std::make_unique<Remap>());
    uint64_t bytes = 0;
    for (const ArenaRange& range : arena_.ranges()) {
      // SAFETY: only named here.
      remaps_[Below(random_, count)]->ranges.push_back(
          {{reinterpret_cast<void*>(range.address), range.pages * 4096}, !range.quiet});
      bytes += range.pages * 4096;
    }
    totals_.bytes += bytes;
    std::erase_if(remaps_, [](const auto& remap) { return remap->ranges.empty(); });
    for (auto& remap : remaps_) {
      RemapOptions& o = remap->options;
      o.threads = static_cast<int>(1 + Below(random_, 3));
      o.guard = fault_ ? unmoor::Guard::kFault : unmoor::Guard::kFreeze;
      constexpr int kPauses[] = {200, 500, 1000, 3000};
      o.max_pause = microseconds(kPauses[Below(random_, std::size(kPauses))]);
      constexpr unmoor::RemapOrder kOrders[] = {unmoor::RemapOrder::kGiven,
                                                unmoor::RemapOrder::kSequential,
                                                unmoor::RemapOrder::kHotFirst};
      o.order = kOrders[Below(random_, std::size(kOrders))];
      o.huge_pages = !OneIn(random_, 4);
      o.verify = !OneIn(random_, 4);
      // Lasts a fiftieth to an eighth of a second, when not as fast as it goes.
      if (!OneIn(random_, 3)) o.bytes_per_second = (bytes + 1) * (8 + Below(random_, 40));
    }
  }

  void RemapFromInside() {
    MakeRemaps();
    for (auto& remap : remaps_) remap->Start();
    pthread_rwlock_unlock(&state_.watched);
    const uint64_t since = CpuNanos();
    int cancels = static_cast<int>(Below(random_, 3));
    while (!AllDone()) {
      usleep(static_cast<useconds_t>(100 + Below(random_, 4000)));
      SendSignals();
      WatchProgress();
      if (Allows(options_, "control")) Interfere(cancels);
      if (CpuNanos() - since > kRemapCpuTime) {
        std::string reasons;
        for (auto& remap : remaps_) reasons += remap->remapper->progress().reason + "; ";
        Fail("not READY after four minutes of processor time: %s", reasons.c_str());
      }
    }
  }

  bool AllDone() {
    bool all = true;
    for (auto& remap : remaps_) {
      if (remap->done) continue;
      const unmoor::Status status = remap->remapper->Wait(std::chrono::nanoseconds(0));
      if (status.ok()) {
        remap->done = true;
        Collect(*remap);
        continue;
      }
      all = false;
      switch (status.code()) {
        case StatusCode::kTimedOut:
          break;
        case StatusCode::kBusy:
          ++stood_still_;
          remap->remapper->Resume();
          break;
        default:
          Fail("the remap ended: %s", status.message().c_str());
      }
    }
    return all;
  }

  void Collect(Remap& remap) {
    const RemapProgress progress = remap.remapper->progress();
    totals_.windows += progress.windows;
    totals_.aborted += progress.aborted;
    totals_.faults_caught += progress.faults_caught;
    totals_.longest_pause_ns =
        std::max(totals_.longest_pause_ns, static_cast<uint64_t>(progress.longest_pause.count()));
    totals_.longest_guard_ns =
        std::max(totals_.longest_guard_ns, static_cast<uint64_t>(progress.longest_guard.count()));
  }

  void Interfere(int& cancels) {
    auto& remap = remaps_[Below(random_, remaps_.size())];
    switch (Below(random_, 12)) {
      case 0:
        remap->remapper->Pause();
        usleep(static_cast<useconds_t>(Below(random_, 20'000)));
        remap->remapper->Resume();
        break;
      case 1:
        if (OneIn(random_, 4)) remap->remapper->FinishNow();
        break;
      case 2:
        if (cancels-- > 0 && !remap->done) CancelAndStartAnew(*remap);
        break;
      default:
        break;
    }
  }

  void CancelAndStartAnew(Remap& remap) {
    pthread_rwlock_wrlock(&state_.watched);
    remap.remapper->Cancel();
    if (OneIn(random_, 2)) {
      const unmoor::Status status = remap.remapper->Wait();
      if (!status.ok() && status.code() != StatusCode::kCancelled) {
        Fail("after Cancel: %s", status.message().c_str());
      }
    }
    Collect(remap);
    remap.remapper.reset();
    usleep(static_cast<useconds_t>(Below(random_, 2000)));
    remap.Start();
    pthread_rwlock_unlock(&state_.watched);
    ++totals_.cancelled;
  }

  // --- the agent, from outside ---

  void RemapFromOutside() {
    uint64_t bytes = 0;
    for (const ArenaRange& range : arena_.ranges()) bytes += range.pages * 4096;
    totals_.bytes += bytes;
    const std::string pid = std::to_string(getpid());
    const char* guard = fault_ ? "fault" : "freeze";
    const char* arguments[] = {
        options_.remap_command.c_str(), "remap", "-t", pid.c_str(), "--guard", guard, nullptr};
    pid_t child = 0;
    const int error =
        posix_spawn(&child, arguments[0], nullptr, nullptr, const_cast<char**>(arguments), environ);
    if (error != 0) Fail("%s: %s", arguments[0], std::strerror(error));
    int status = 0;
    for (;;) {
      const pid_t ended = waitpid(child, &status, WNOHANG);
      if (ended == child) break;
      usleep(static_cast<useconds_t>(100 + Below(random_, 2000)));
      SendSignals();
      WatchProgress();
    }
    if (status != 0) Fail("`%s remap` ended with status %#x", arguments[0], status);
    ++totals_.windows;
    pthread_rwlock_unlock(&state_.watched);
  }

  // --- what the controller sees to besides ---

  void SendSignals() {
    if (!Allows(options_, "signals")) return;
    for (int n = static_cast<int>(Below(random_, 4)); n > 0; --n) {
      const auto& writer = writers_[Below(random_, writers_.size())];
      pthread_kill(writer->thread(), OneIn(random_, 2) ? SIGUSR1 : SIGUSR2);
    }
  }

  void WatchProgress() {
    uint64_t operations = 0;
    for (const auto& writer : writers_) operations += writer->operations();
    const uint64_t now = NowNanos();
    if (operations != seen_operations_) {
      seen_operations_ = operations;
      seen_at_ = now;
    } else if (now - seen_at_ > kStuckAfter) {
      Fail("no writer has done anything for a minute");
    }
    for (const auto& remap : remaps_) {
      const RemapProgress progress = remap->remapper->progress();
      if (progress.done_bytes > progress.total_bytes) Fail("more was remapped than there is");
      if (progress.status == unmoor::RemapStatus::kNever) {
        Fail("status NEVER: %s", progress.reason.c_str());
      }
    }
  }

  void CheckEnd() {
    uint64_t counted = 0;
    for (int i = 0; i < 512; ++i) counted += arena_.counters()[i];
    if (counted != added_) {
      Fail("the counters hold %llu, %llu was added", (unsigned long long)counted,
           (unsigned long long)added_);
    }
    const auto status = unmoor::QueryStatus();
    if (!status.ok()) Fail("QueryStatus: %s", status.status().message().c_str());
    if (status->status != unmoor::RemapStatus::kReady) {
      Fail("not READY at the end: %s", status->reason.c_str());
    }
    for (const auto& remap : remaps_) {
      const RemapProgress progress = remap->remapper->progress();
      if (progress.status != unmoor::RemapStatus::kReady) Fail("READY, but its progress is not");
      for (int i = 0; i < 5000 && remap->completions == 0; ++i) usleep(1000);
      if (remap->completions != 1) Fail("on_complete ran %d times", remap->completions.load());
    }
  }

  void Leftovers(size_t fds, size_t threads) {
    const size_t fds_now = CountEntries("/proc/self/fd");
    if (fds_now != fds) Fail("%zu descriptors were open before the round, %zu after", fds, fds_now);
    size_t now = 0;
    for (int i = 0; i < 2000; ++i) {  // a joined thread may still be on its way out of the kernel
      now = CountEntries("/proc/self/task");
      if (now == threads) return;
      usleep(1000);
    }
    Fail("%zu threads before the round, %zu after", threads, now);
  }

  const Options& options_;
  Random random_;
  Totals& totals_;
  const std::string directory_;
  const bool fault_;
  const size_t writer_count_;
  Arena arena_;
  RoundState state_;
  std::vector<std::unique_ptr<Writer>> writers_;
  std::vector<std::unique_ptr<Remap>> remaps_;
  uint64_t added_ = 0;
  uint64_t stood_still_ = 0;
  uint64_t seen_operations_ = 0;
  uint64_t seen_at_ = NowNanos();
};

}  // namespace

void RunRound(const Options& options, uint64_t round, const std::string& directory, int direct_file,
              Totals& totals) {
  SetRound(round);
  ThisThread() = {-1, 0, "the controller"};
  auto state = std::make_unique<Round>(options, round, directory, direct_file, totals);
  state->Run();
}

}  // namespace torture
