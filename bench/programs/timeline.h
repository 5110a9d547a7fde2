// What bench_heap's threads tell about themselves, in a file that is mapped shared: bench/run reads
// it at any time, and it survives a restore. bench/run knows this layout too (class Timeline).
//
// Each thread writes its own part only. Times are CLOCK_REALTIME: CRIU restores programs into a
// time namespace where CLOCK_MONOTONIC goes on from the dump.
#pragma once

#include <cstdint>

namespace bench {

inline constexpr uint64_t kTimelineThreads = 8;
inline constexpr uint64_t kTimelineMillis = 1 << 18;  // later ones are not counted
inline constexpr uint64_t kTimelineGaps = 4096;       // a ring
inline constexpr uint64_t kGapNanos = 100'000;        // shorter ones are not noted

struct Gap {
  uint64_t begin_ns;
  uint64_t length_ns;
};

struct ThreadTimeline {
  uint64_t sweeps;
  uint64_t gaps_seen;
  Gap gaps[kTimelineGaps];
  uint16_t pages[kTimelineMillis];  // written in that millisecond
};

struct Timeline {
  uint64_t begin_ns;
  uint64_t threads;
  ThreadTimeline thread[kTimelineThreads];
};

}  // namespace bench
