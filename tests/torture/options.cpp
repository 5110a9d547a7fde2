// See options.h.
#include "options.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace torture {
namespace {

constexpr const char* kUsage =
    "torture: writers whose every page checks itself, on memory that is remapped under them\n"
    "  --seed N             of all that is random; printed, and again with every failure\n"
    "  --operations N       in all rounds together (2000000)\n"
    "  --hours H            so long instead\n"
    "  --round N            only this round of the seed\n"
    "  --guard freeze|fault|any\n"
    "  --threads N          writers in every round (else 1 to 64)\n"
    "  --mib N              direct-mapped memory at most (24)\n"
    "  --dir DIR            where images are made\n"
    "  --without A,B --only A,B   operations: write check count giveback free protect move remap\n"
    "                       cover fork rawfork spawn pipe datagram random direct probe deny born\n"
    "                       block signals stacks control\n"
    "  --remap-command PATH `PATH remap` from outside instead of the library's remapper\n"
    "  --verbose\n";

[[noreturn]] void Usage(const char* why) {
  std::fprintf(stderr, "torture: %s\n%s", why, kUsage);
  std::exit(2);
}

bool IsListed(const std::string& list, const char* name) {
  const std::string padded = "," + list + ",";
  return padded.find("," + std::string(name) + ",") != std::string::npos;
}

}  // namespace

Options ParseOptions(int argc, char** argv) {
  Options options;
  const char* temporary = std::getenv("TMPDIR");
  options.directory = temporary != nullptr ? temporary : "/tmp";
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--verbose") {
      options.verbose = true;
      continue;
    }
    if (name == "--help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    }
    if (++i == argc) Usage(("no value for " + name).c_str());
    const char* value = argv[i];
    if (name == "--seed") {
      options.seed = std::strtoull(value, nullptr, 10);
    } else if (name == "--operations") {
      options.operations = std::strtoull(value, nullptr, 10);
    } else if (name == "--hours") {
      options.hours = std::strtod(value, nullptr);
    } else if (name == "--round") {
      options.only_round = std::strtoll(value, nullptr, 10);
    } else if (name == "--guard") {
      options.guard = value;
    } else if (name == "--threads") {
      options.threads = std::atoi(value);
    } else if (name == "--mib") {
      options.mib = std::strtoull(value, nullptr, 10);
    } else if (name == "--dir") {
      options.directory = value;
    } else if (name == "--without") {
      options.without = value;
    } else if (name == "--only") {
      options.only = value;
    } else if (name == "--remap-command") {
      options.remap_command = value;
    } else {
      Usage(("unknown option " + name).c_str());
    }
  }
  if (options.guard != "freeze" && options.guard != "fault" && options.guard != "any") {
    Usage("--guard is freeze, fault or any");
  }
  if (options.threads < 0 || options.threads > 64 || options.mib < 1) Usage("out of bounds");
  if (options.seed == 0) options.seed = static_cast<uint64_t>(std::time(nullptr));
  return options;
}

bool Allows(const Options& options, const char* name) {
  if (!options.only.empty()) return IsListed(options.only, name);
  return !IsListed(options.without, name);
}

}  // namespace torture
