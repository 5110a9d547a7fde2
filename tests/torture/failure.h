// How torture ends when something that must hold does not: one line with the seed, the round and
// the operation, and exit code 1 (in a forked child 42, which the parent turns into its own).
//
// Fail() is async-signal-safe and may be called from any thread.
#pragma once

#include <cstdint>

namespace torture {

inline constexpr int kChildFailed = 42;

void SetRun(uint64_t seed);
void SetRound(uint64_t round);
void BecomeChild();  // in a forked child

// Of the calling thread, for messages.
struct Where {
  int thread = -1;
  uint64_t operation = 0;
  const char* what = "starting";
};
Where& ThisThread();

[[noreturn]] __attribute__((format(printf, 1, 2))) void Fail(const char* format, ...);

// Without a library behind it, so that signal handlers may.
uint64_t NowNanos();

}  // namespace torture
