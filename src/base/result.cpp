// Formatting of errors and the abort line of a failed check. See result.h.
#include "base/result.h"

#include <cstdio>
#include <cstdlib>
#include <system_error>

namespace unmoor {

Failure SystemError(int errnum, std::string_view what) {
  return Failure(Error(ErrorKind::kMachine, errnum,
                       fmt::format("{}: {}", what, std::generic_category().message(errnum))));
}

namespace internal {

void CheckFailed(const char* file, int line, const char* condition) {
  std::fprintf(stderr, "unmoor: bug: %s:%d: %s does not hold; please report this line\n", file,
               line, condition);
  std::abort();
}

}  // namespace internal
}  // namespace unmoor
