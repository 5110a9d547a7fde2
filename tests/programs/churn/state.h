// What churn's threads share: whether to stop, and their figures.
//
// Every Stats belongs to one thread, which alone writes it; the main thread reads. All are atomic
// and relaxed: they are figures, no other memory is published through them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "churn/options.h"
#include "region.h"

namespace churn {

// Latencies in steps of an eighth of a power of two.
class Histogram {
 public:
  void Add(uint64_t nanos) {
    auto& bucket = buckets_[BucketOf(nanos)];
    bucket.store(bucket.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
  void Clear() {
    for (auto& bucket : buckets_) bucket.store(0, std::memory_order_relaxed);
  }
  uint64_t Count(size_t bucket) const { return buckets_[bucket].load(std::memory_order_relaxed); }

  static constexpr size_t kBuckets = 64 * 8;
  static size_t BucketOf(uint64_t nanos) {
    if (nanos < 8) return static_cast<size_t>(nanos);
    const unsigned exponent = 63u - static_cast<unsigned>(__builtin_clzll(nanos));
    return exponent * 8 + ((nanos >> (exponent - 3)) & 7);
  }
  static uint64_t UpperEnd(size_t bucket) {
    if (bucket < 24) return bucket;
    const size_t exponent = bucket / 8;
    return (uint64_t{8 + bucket % 8 + 1} << (exponent - 3)) - 1;
  }

 private:
  std::atomic<uint64_t> buckets_[kBuckets] = {};
};

struct alignas(64) Stats {
  std::atomic<uint64_t> operations{0};
  std::atomic<uint64_t> longest_gap{0};  // nanoseconds between two operations
  std::atomic<uint64_t> sweeps{0};       // times all of the thread's pages were verified
  std::atomic<uint64_t> resets_seen{0};
  Histogram gaps;
};

// How often each hazard did what it does.
struct Hazards {
  std::atomic<uint64_t> dontneed{0}, madv_free{0}, madv_free_refused{0}, remapped{0}, grown_heap{0},
      protected_{0}, mapped_over{0}, unmapped{0}, forks{0}, spawned{0}, threads_born{0},
      syscalls{0}, interrupted{0};
};

struct State {
  Options options;
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> resets{0};
  std::vector<std::unique_ptr<Region>> regions;  // the workers' memory, interleaved by thread
  std::unique_ptr<Stats[]> stats;                // one for each worker
  Hazards hazards;
};

// Verifies and writes the pages of thread `index` until told to stop; verifies all at the end.
void Work(State& state, size_t index);

// One thread for each hazard asked for. Their regions are made, and filled, by the constructor.
class HazardThreads {
 public:
  explicit HazardThreads(State& state);
  ~HazardThreads();
  void Start();
  void Join();

 private:
  struct Thread;
  State& state_;
  std::vector<std::unique_ptr<Thread>> threads_;
};

}  // namespace churn
