// The command line of churn.
#pragma once

#include <cstddef>
#include <cstdint>

namespace churn {

enum class Pattern { kSequential, kUniform, kHot };

struct Options {
  const char* report = nullptr;
  int threads = 1;
  size_t mib = 64;
  size_t regions = 4;  // the memory is that many mappings
  Pattern pattern = Pattern::kUniform;
  double hot_share = 0.9;    // of the writes (pattern hot) that go to 1/64 of the pages
  double write_share = 1.0;  // the others only verify
  uint64_t rate = 0;         // operations a second and thread; 0: as fast as it goes
  uint64_t sweep_ms = 500;   // a thread verifies all its pages that often
  bool sparse = false;       // 1/4 of the pages never touched, 1/4 touched but zero
  bool lock = false;         // all memory is locked (mlockall)
  uint64_t exit_after_ms = 0;
  uint64_t exec_after_ms = 0;

  // Hazards, each in regions of its own, and dontneed and fork in the threads' own pages too.
  size_t hazard_mib = 16;
  uint64_t hazard_us = 500;  // pause between two of its actions
  uint64_t fork_ms = 300;    // how long a forked child lives
  bool dontneed = false;
  bool madv_free = false;
  bool remapper = false;
  bool grow_heap = false;
  bool mprotect = false;
  bool mmap_over = false;
  bool munmap = false;
  bool fork = false;
  bool spawn = false;
  bool threads_churn = false;
  bool syscalls = false;
};

// Ends the program with a usage message on a mistake.
Options ParseOptions(int argc, char** argv);

}  // namespace churn
