// See options.h.
#include "churn/options.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace churn {
namespace {

constexpr const char* kUsage =
    "usage: churn --report FILE [--threads N] [--mib N] [--regions N] [--sparse] [--lock]\n"
    "             [--pattern seq|uniform|hot] [--hot SHARE] [--write-share SHARE] [--rate N]\n"
    "             [--sweep-ms N] [--exit-after-ms N] [--exec-after-ms N]\n"
    "             [--hazard-mib N] [--hazard-us N] [--dontneed] [--madv-free] [--remapper] "
    "[--brk]\n"
    "             [--mprotect] [--mmap-over] [--munmap] [--fork] [--fork-ms N] [--spawn]\n"
    "             [--threads-churn] [--syscalls]\n"
    "SIGUSR1 begins new stall figures, SIGUSR2 executes the program anew, SIGTERM verifies all and "
    "ends.\n";

[[noreturn]] void Usage() {
  std::fputs(kUsage, stderr);
  std::exit(2);
}

Pattern ParsePattern(const std::string& name) {
  if (name == "seq") return Pattern::kSequential;
  if (name == "uniform") return Pattern::kUniform;
  if (name == "hot") return Pattern::kHot;
  Usage();
}

}  // namespace

Options ParseOptions(int argc, char** argv) {
  Options options;
  struct Flag {
    const char* name;
    bool* value;
  };
  const Flag flags[] = {
      {"--sparse", &options.sparse},       {"--dontneed", &options.dontneed},
      {"--madv-free", &options.madv_free}, {"--remapper", &options.remapper},
      {"--brk", &options.grow_heap},       {"--mprotect", &options.mprotect},
      {"--mmap-over", &options.mmap_over}, {"--munmap", &options.munmap},
      {"--fork", &options.fork},           {"--spawn", &options.spawn},
      {"--syscalls", &options.syscalls},   {"--threads-churn", &options.threads_churn},
      {"--lock", &options.lock},
  };
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    bool is_flag = false;
    for (const Flag& flag : flags) {
      if (name != flag.name) continue;
      *flag.value = true;
      is_flag = true;
    }
    if (is_flag) continue;
    if (i + 1 >= argc) Usage();
    const char* value = argv[++i];
    const auto number = [value] { return std::strtoull(value, nullptr, 10); };
    if (name == "--report")
      options.report = value;
    else if (name == "--threads")
      options.threads = static_cast<int>(number());
    else if (name == "--mib")
      options.mib = number();
    else if (name == "--regions")
      options.regions = number();
    else if (name == "--pattern")
      options.pattern = ParsePattern(value);
    else if (name == "--hot")
      options.hot_share = std::strtod(value, nullptr);
    else if (name == "--write-share")
      options.write_share = std::strtod(value, nullptr);
    else if (name == "--rate")
      options.rate = number();
    else if (name == "--sweep-ms")
      options.sweep_ms = number();
    else if (name == "--exit-after-ms")
      options.exit_after_ms = number();
    else if (name == "--exec-after-ms")
      options.exec_after_ms = number();
    else if (name == "--hazard-mib")
      options.hazard_mib = number();
    else if (name == "--hazard-us")
      options.hazard_us = number();
    else if (name == "--fork-ms")
      options.fork_ms = number();
    else
      Usage();
  }
  if (options.threads < 1 || options.mib < 1 || options.regions < 1) Usage();
  return options;
}

}  // namespace churn
