// churn: threads that write self-checking memory without pause, and tell when a write is lost.
//
// The program under test of the system tests. Main fills the memory, starts the threads and reports
// five times a second; a thread that finds a page other than expected ends the program at once with
// the reason in the report. SIGTERM: one last verification of everything, a report with "final":
// true, exit code 0. Its descriptors 0 to 2 should be /dev/null: CRIU checks the size of open
// files.
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <thread>

#include "churn/state.h"

namespace churn {
namespace {

constexpr uint64_t kReportNanos = 200'000'000;
constexpr size_t kPagesPerMib = 256;
constexpr const char* kExecutions = "CHURN_EXECUTIONS";

// Only set in signal handlers and by the clock.
std::atomic<bool> end_wanted{false};
std::atomic<bool> exec_wanted{false};
std::atomic<uint64_t> resets{0};

void InstallHandlers() {
  struct sigaction action = {};
  action.sa_flags = SA_RESTART;
  action.sa_handler = [](int) { end_wanted = true; };
  sigaction(SIGTERM, &action, nullptr);
  action.sa_handler = [](int) { resets.fetch_add(1); };
  sigaction(SIGUSR1, &action, nullptr);
  action.sa_handler = [](int) { exec_wanted = true; };
  sigaction(SIGUSR2, &action, nullptr);
}

void FillMemory(State& state) {
  const Options& options = state.options;
  const size_t each = options.mib * kPagesPerMib / options.regions;
  for (size_t r = 0; r < options.regions; ++r) {
    state.regions.push_back(std::make_unique<Region>(each, (uint64_t{0x100} + r) << 32));
  }
  const auto threads = static_cast<size_t>(options.threads);
  for (size_t p = 0; p < each * options.regions; ++p) {
    Region& region = *state.regions[p / each];
    // The groups that a worker leaves alone, see Worker::LeftAlone.
    const size_t group = options.sparse ? p / threads / 4 % 4 : 0;
    if (group == 2) {
      *static_cast<volatile uint64_t*>(region.Page(p % each)) = 0;
    } else if (group != 3) {
      region.Write(p % each);
    }
  }
}

struct Summary {
  uint64_t operations = 0, sweeps = 0, stall = 0, p50 = 0, p99 = 0, p999 = 0;
  bool reset_by_all = true;
};

Summary Summarise(const State& state) {
  Summary summary;
  uint64_t counts[Histogram::kBuckets] = {};
  uint64_t all = 0;
  for (int t = 0; t < state.options.threads; ++t) {
    const Stats& stats = state.stats[static_cast<size_t>(t)];
    summary.operations += stats.operations.load(std::memory_order_relaxed);
    const uint64_t sweeps = stats.sweeps.load(std::memory_order_relaxed);
    if (t == 0 || sweeps < summary.sweeps) summary.sweeps = sweeps;
    const uint64_t gap = stats.longest_gap.load(std::memory_order_relaxed);
    if (gap > summary.stall) summary.stall = gap;
    if (stats.resets_seen.load() != state.resets.load()) summary.reset_by_all = false;
    for (size_t b = 0; b < Histogram::kBuckets; ++b) {
      counts[b] += stats.gaps.Count(b);
      all += stats.gaps.Count(b);
    }
  }
  uint64_t below = 0;
  for (size_t b = 0; b < Histogram::kBuckets; ++b) {
    const uint64_t before = below;
    below += counts[b];
    const auto reaches = [&](uint64_t rank) { return before < rank && below >= rank; };
    if (reaches(all - all / 2)) summary.p50 = Histogram::UpperEnd(b);
    if (reaches(all - all / 100)) summary.p99 = Histogram::UpperEnd(b);
    if (reaches(all - all / 1000)) summary.p999 = Histogram::UpperEnd(b);
  }
  return summary;
}

class Reporter {
 public:
  explicit Reporter(const State& state) : state_(state), started_(report::NowNanos()) {
    const char* executions = std::getenv(kExecutions);
    executions_ = executions == nullptr ? 0 : std::atoi(executions);
  }

  int executions() const { return executions_; }

  void Report(bool final) {
    const uint64_t now = report::NowNanos();
    const Summary s = Summarise(state_);
    const Hazards& h = state_.hazards;
    const auto n = [](const std::atomic<uint64_t>& value) {
      return (unsigned long long)value.load();
    };
    const double seconds = static_cast<double>(now - last_) / 1e9;
    const double rate = last_ == 0 ? 0 : static_cast<double>(s.operations - operations_) / seconds;
    last_ = now;
    operations_ = s.operations;
    char text[3072];
    std::snprintf(
        text, sizeof text,
        "\"ready\": true, \"final\": %s, \"reports\": %llu, \"executions\": %d, \"seconds\": %.3f, "
        "\"operations\": %llu, \"rate\": %.0f, \"sweeps\": %llu, \"resets\": %llu, "
        "\"stall_ns\": %llu, \"p50_ns\": %llu, \"p99_ns\": %llu, \"p999_ns\": %llu, "
        "\"hazards\": {\"dontneed\": %llu, \"madv_free\": %llu, \"madv_free_refused\": %llu, "
        "\"remapper\": %llu, \"brk\": %llu, \"mprotect\": %llu, \"mmap_over\": %llu, "
        "\"munmap\": %llu, \"fork\": %llu, \"spawn\": %llu, \"threads_churn\": %llu, "
        "\"syscalls\": %llu, \"interrupted\": %llu}",
        final ? "true" : "false", (unsigned long long)++reports_, executions_,
        static_cast<double>(now - started_) / 1e9, (unsigned long long)s.operations, rate,
        (unsigned long long)s.sweeps,
        s.reset_by_all ? n(state_.resets) : (unsigned long long)(n(state_.resets) - 1),
        (unsigned long long)s.stall, (unsigned long long)s.p50, (unsigned long long)s.p99,
        (unsigned long long)s.p999, n(h.dontneed), n(h.madv_free), n(h.madv_free_refused),
        n(h.remapped), n(h.grown_heap), n(h.protected_), n(h.mapped_over), n(h.unmapped),
        n(h.forks), n(h.spawned), n(h.threads_born), n(h.syscalls), n(h.interrupted));
    report::Write(text);
  }

 private:
  const State& state_;
  const uint64_t started_;
  uint64_t last_ = 0, operations_ = 0, reports_ = 0;
  int executions_ = 0;
};

[[noreturn]] void ExecuteAnew(char** argv, int executions) {
  char count[16];
  std::snprintf(count, sizeof count, "%d", executions + 1);
  setenv(kExecutions, count, 1);
  execv("/proc/self/exe", argv);
  report::Fail("exec: %s", std::strerror(errno));
}

int Run(int argc, char** argv) {
  State state;
  state.options = ParseOptions(argc, argv);
  const Options& options = state.options;
  report::Open("churn", options.report);
  if (options.lock && mlockall(MCL_CURRENT | MCL_FUTURE) != 0) {
    report::Fail("mlockall: %s", std::strerror(errno));
  }
  InstallHandlers();
  state.stats = std::make_unique<Stats[]>(static_cast<size_t>(options.threads));
  FillMemory(state);
  HazardThreads hazards(state);
  Reporter reporter(state);
  std::vector<std::thread> workers;
  for (size_t t = 0; t < static_cast<size_t>(options.threads); ++t) {
    workers.emplace_back([&state, t] { Work(state, t); });
  }
  hazards.Start();

  const uint64_t start = report::NowNanos();
  for (uint64_t now = start; !end_wanted.load(); now = report::NowNanos()) {
    state.resets = resets.load();
    reporter.Report(false);
    const bool exec_due = options.exec_after_ms > 0 && reporter.executions() == 0 &&
                          now - start > options.exec_after_ms * 1'000'000;
    if (exec_wanted.load() || exec_due) ExecuteAnew(argv, reporter.executions());
    if (options.exit_after_ms > 0 && now - start > options.exit_after_ms * 1'000'000) break;
    const timespec pause{0, kReportNanos};
    nanosleep(&pause, nullptr);
  }
  state.stop = true;
  for (auto& worker : workers) worker.join();
  hazards.Join();
  reporter.Report(true);
  return 0;
}

}  // namespace
}  // namespace churn

int main(int argc, char** argv) {
  return churn::Run(argc, argv);
}
