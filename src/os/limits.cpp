// See limits.h.
#include "os/limits.h"

#include <sys/resource.h>

namespace unmoor {

void CopyMemoryLimits(Pid from, Pid to) {
  for (const auto which : {RLIMIT_AS, RLIMIT_DATA}) {
    rlimit limit{};
    if (::prlimit(from.value, which, nullptr, &limit) != 0) return;
    (void)::prlimit(to.value, which, &limit, nullptr);
  }
}

}  // namespace unmoor
