// See backoff.h.
#include "os/backoff.h"

#include <sched.h>

#include "os/process_control.h"

namespace unmoor {

void WaitALittle(int turn) {
  constexpr int kYields = 64;
  if (turn < kYields) {
    ::sched_yield();
  } else {
    SleepFor(Nanos(20'000));
  }
}

}  // namespace unmoor
