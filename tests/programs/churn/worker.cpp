// A worker: verifies each of its pages before it writes it anew, and measures its own gaps.
//
// Page p of all regions together belongs to thread p mod threads. Three things are known about the
// thread's pages, in different places: what each must hold (the region's ledger, shared memory),
// the sum of what they show (on the stack), and what they say themselves. Memory that is set back
// to an earlier state as a whole is therefore seen too.
#include <fcntl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "churn/state.h"

namespace churn {
namespace {

class Worker {
 public:
  Worker(State& state, size_t index)
      : state_(state),
        options_(state.options),
        stats_(state.stats[index]),
        random_(index + 1),
        index_(index),
        stride_(static_cast<size_t>(options_.threads)),
        pages_each_(state.regions[0]->count()) {
    const size_t all = pages_each_ * state.regions.size();
    own_ = (all - index + stride_ - 1) / stride_;
    for (size_t n = 0; n < own_; ++n) shown_ += RegionOf(n).Shown(PageOf(n));
  }

  void Run() {
    uint64_t next_sweep = report::NowNanos() + options_.sweep_ms * 1'000'000;
    Rebase();
    while (!state_.stop.load(std::memory_order_relaxed)) {
      for (int i = 0; i < 64; ++i) Operate();
      if (options_.fork) ForkNowAndThen();
      if (last_ > next_sweep) {
        Sweep("sweep");
        next_sweep = last_ + options_.sweep_ms * 1'000'000;
      }
    }
    Sweep("last sweep");
    if (child_ > 0) ReapChild(0);
  }

 private:
  // The thread's n-th page, as a region and a page of that region.
  Region& RegionOf(size_t n) const { return *state_.regions[(n * stride_ + index_) / pages_each_]; }
  size_t PageOf(size_t n) const { return (n * stride_ + index_) % pages_each_; }

  static bool LeftAlone(size_t n) { return (n / 4) % 4 >= 2; }

  size_t Choose() {
    size_t n = 0;
    switch (options_.pattern) {
      case Pattern::kSequential:
        n = next_++ % own_;
        break;
      case Pattern::kUniform:
        n = random_.Below(own_);
        break;
      case Pattern::kHot: {
        const size_t hot = own_ / 64 + 1;
        const bool to_hot =
            static_cast<double>(random_.Below(1'000'000)) < options_.hot_share * 1e6;
        n = random_.Below(to_hot ? hot : own_);
        break;
      }
    }
    return n;
  }

  void Operate() {
    size_t n = Choose();
    if (options_.sparse && LeftAlone(n)) n -= (n / 4) % 4 * 4;  // the written group before it
    Region& region = RegionOf(n);
    const size_t page = PageOf(n);
    region.Check(page, "before writing it");
    if (options_.write_share >= 1 ||
        static_cast<double>(random_.Below(1'000'000)) < options_.write_share * 1e6) {
      const uint64_t before = region.Shown(page);
      region.Write(page);
      shown_ += region.Shown(page) - before;
    }
    if (options_.dontneed && random_.OneIn(256)) DropPage(region, page);
    stats_.operations.store(stats_.operations.load(std::memory_order_relaxed) + 1,
                            std::memory_order_relaxed);
    Tick();
    if (options_.rate > 0) KeepRate();
  }

  void DropPage(Region& region, size_t page) {
    shown_ -= region.Shown(page);
    region.ExpectZero(page, page + 1);
    if (madvise(region.Address(page), pages::kSize, MADV_DONTNEED) != 0) {
      report::Fail("MADV_DONTNEED: %s", std::strerror(errno));
    }
    region.Check(page, "right after MADV_DONTNEED of it");
    state_.hazards.dontneed.fetch_add(1, std::memory_order_relaxed);
  }

  // Every page, and the sum of what they show.
  void Sweep(const char* when) {
    uint64_t sum = 0;
    for (size_t n = 0; n < own_; ++n) {
      RegionOf(n).Check(PageOf(n), when);
      sum += RegionOf(n).Page(PageOf(n))[0];
      Tick();
    }
    if (sum != shown_) {
      report::Fail("thread %zu: its pages add up to %llu writes, its stack says %llu (%s)", index_,
                   (unsigned long long)sum, (unsigned long long)shown_, when);
    }
    stats_.sweeps.store(stats_.sweeps.load(std::memory_order_relaxed) + 1,
                        std::memory_order_relaxed);
  }

  void Tick() {
    const uint64_t resets = state_.resets.load(std::memory_order_relaxed);
    const uint64_t now = report::NowNanos();
    if (resets != stats_.resets_seen.load(std::memory_order_relaxed)) {
      stats_.longest_gap.store(0, std::memory_order_relaxed);
      stats_.gaps.Clear();
      stats_.resets_seen.store(resets, std::memory_order_relaxed);
    } else {
      const uint64_t gap = now > last_ ? now - last_ : 0;
      stats_.gaps.Add(gap);
      if (gap > stats_.longest_gap.load(std::memory_order_relaxed)) {
        stats_.longest_gap.store(gap, std::memory_order_relaxed);
      }
    }
    last_ = now;
  }

  // What the thread did meanwhile was its own wish and no stall.
  void Rebase() { last_ = report::NowNanos(); }

  void KeepRate() {
    due_ += 1'000'000'000 / options_.rate;
    if (due_ < last_) due_ = last_;  // late: no hurry to catch up
    if (due_ - last_ < 200'000) return;
    const timespec until{static_cast<time_t>(due_ / 1'000'000'000),
                         static_cast<long>(due_ % 1'000'000'000)};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr);
    // The gap counts from when it should have gone on.
    last_ = due_;
  }

  void ForkNowAndThen() {
    if (child_ > 0) {
      ReapChild(WNOHANG);
      return;
    }
    if (last_ < next_fork_) return;
    next_fork_ = last_ + options_.fork_ms * 1'000'000 * 2;
    child_ = fork();
    if (child_ < 0) report::Fail("fork: %s", std::strerror(errno));
    if (child_ == 0) LiveAsChild();
    state_.hazards.forks.fetch_add(1, std::memory_order_relaxed);
    Rebase();
  }

  void ReapChild(int flags) {
    int status = 0;
    const pid_t reaped = waitpid(child_, &status, flags);
    if (reaped == 0 || (reaped < 0 && errno == EINTR)) return;
    if (reaped < 0) report::Fail("waitpid %d: %s", child_, std::strerror(errno));
    if (WIFSIGNALED(status)) {
      report::Fail("forked child %d was killed by signal %d", child_, WTERMSIG(status));
    }
    if (WEXITSTATUS(status) != 0) {
      report::Fail("forked child %d found wrong memory, see the report's .child", child_);
    }
    child_ = 0;
  }

  // The child sees the thread's pages as they were at the fork, while the parent writes on. Only
  // this thread's pages: the others' may have been caught in the middle of a write.
  [[noreturn]] void LiveAsChild() {
    report::BecomeChild();
    const uint64_t end = report::NowNanos() + options_.fork_ms * 1'000'000;
    do {
      uint64_t sum = 0;
      for (size_t n = 0; n < own_; ++n) sum += RegionOf(n).CheckWhole(PageOf(n), "after fork");
      if (sum != shown_) {
        report::Fail("pages add up to %llu writes, at the fork there were %llu",
                     (unsigned long long)sum, (unsigned long long)shown_);
      }
    } while (report::NowNanos() < end);
    constexpr uint64_t kOfChild = uint64_t{1} << 40;
    for (size_t n = 0; n < own_; n += 8) RegionOf(n).WriteInChild(PageOf(n), kOfChild + n);
    for (size_t n = 0; n < own_; n += 8) {
      if (!RegionOf(n).HoldsInChild(PageOf(n), kOfChild + n)) {
        report::Fail("a forked child's own write to page %zu was lost", PageOf(n));
      }
    }
    _exit(0);
  }

  State& state_;
  const Options& options_;
  Stats& stats_;
  Random random_;
  const size_t index_;
  const size_t stride_;
  const size_t pages_each_;
  size_t own_ = 0;
  size_t next_ = 0;
  uint64_t shown_ = 0;
  uint64_t last_ = 0;
  uint64_t due_ = 0;
  uint64_t next_fork_ = 0;
  pid_t child_ = 0;
};

}  // namespace

void Work(State& state, size_t index) {
  Worker(state, index).Run();
}

}  // namespace churn
