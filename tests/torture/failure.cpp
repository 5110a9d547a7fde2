// See failure.h.
#include "failure.h"

#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace torture {
namespace {

std::atomic<uint64_t> seed{0};
std::atomic<uint64_t> round_number{0};
std::atomic<bool> in_child{false};
thread_local Where where;

}  // namespace

void SetRun(uint64_t value) {
  seed = value;
}
void SetRound(uint64_t value) {
  round_number = value;
}
void BecomeChild() {
  in_child = true;
}
Where& ThisThread() {
  return where;
}

void Fail(const char* format, ...) {
  char what[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  char line[1024];
  const int length = std::snprintf(
      line, sizeof line,
      "torture: FAILED: %s\n  in %sthread %d, operation %llu (%s); again with: --seed %llu --round "
      "%llu\n",
      what, in_child.load() ? "a forked child of " : "", where.thread,
      (unsigned long long)where.operation, where.what, (unsigned long long)seed.load(),
      (unsigned long long)round_number.load());
  if (length > 0) {
    const ssize_t written = write(STDERR_FILENO, line, static_cast<size_t>(length));
    (void)written;
  }
  _exit(in_child.load() ? kChildFailed : 1);
}

uint64_t NowNanos() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace torture
