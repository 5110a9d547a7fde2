// One round: an arena, its writers, and remappers that are started, paused, hurried and cancelled
// under them until all of the memory is anonymous.
#pragma once

#include <cstdint>
#include <string>

#include "options.h"
#include "worker.h"

namespace torture {

struct Totals {
  Tally tally;
  uint64_t rounds = 0;
  uint64_t windows = 0;
  uint64_t aborted = 0;
  uint64_t faults_caught = 0;
  uint64_t cancelled = 0;
  uint64_t checkpoints = 0;
  uint64_t bytes = 0;
  uint64_t longest_pause_ns = 0;
  uint64_t longest_guard_ns = 0;
};

void RunRound(const Options& options, uint64_t round, const std::string& directory, int direct_file,
              Totals& totals);

}  // namespace torture
