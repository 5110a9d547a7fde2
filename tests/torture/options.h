// What the torture program is asked to do. Plain values, set once.
#pragma once

#include <cstdint>
#include <string>

namespace torture {

struct Options {
  uint64_t seed = 0;                // 0: from the clock
  uint64_t operations = 2'000'000;  // of all writers together; rounds are run until then
  double hours = 0;                 // instead of a number of operations
  int64_t only_round = -1;
  std::string guard = "any";  // freeze, fault, any
  int threads = 0;            // 0: 1 to 64, another number each round
  uint64_t mib = 24;          // at most, of direct-mapped memory
  std::string directory;      // for images; default: $TMPDIR or /tmp
  std::string without;        // operations left out, by name, separated by commas
  std::string only;           // … or the only ones allowed
  std::string remap_command;  // the agent from outside instead of the library: path of `unmoor`
  bool verbose = false;
};

Options ParseOptions(int argc, char** argv);

// Whether an operation called `name` may be used.
bool Allows(const Options& options, const char* name);

}  // namespace torture
