// `unmoor version`.
#include <cstdio>

#include "command.h"

namespace unmoor::cli {

Action ConfigureVersion(CLI::App& app) {
  (void)app;
  return [](const Invocation&) {
    std::printf("unmoor %s\n", UNMOOR_VERSION);
    return kExitSuccess;
  };
}

}  // namespace unmoor::cli
