// Runs a fuzz target over its corpus as it is, and over seeded mutations of it.
//
//   fuzz_NAME CORPUS_DIRECTORY RUNS [SEED]
//
// The same runs every time, so a failure can be repeated: it is named by its number, and the input
// is kept in $TMPDIR. Allocations are bounded, so that a count taken from the bytes unchecked ends
// the process instead of filling the machine.
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "target.h"

namespace {

using Input = std::vector<uint8_t>;

constexpr size_t kMaxInput = size_t{1} << 20;
constexpr rlim_t kMaxMemory = rlim_t{3} << 30;

Input current;  // for the handler: not changed while the target runs
long current_run = -1;
std::string kept;

void KeepInput(int signal) {
  const int fd = ::open(kept.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  const bool written = fd >= 0 && ::write(fd, current.data(), current.size()) >= 0;
  std::fprintf(stderr, "fuzz: signal %d in run %ld; the input is %s%s\n", signal, current_run,
               written ? "in " : "lost, no ", kept.c_str());
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

size_t Below(std::mt19937_64& random, size_t bound) {
  return bound == 0 ? 0 : random() % bound;
}

void MutateOnce(Input& input, std::mt19937_64& random) {
  constexpr uint64_t kEdges[] = {0,      1,          0x7f,       0x80,        0xff,
                                 0xffff, 0x7fffffff, 0xffffffff, 0x100000000, ~uint64_t{0}};
  const size_t at = Below(random, input.size());
  const size_t length = std::min<size_t>(1 + Below(random, 32), input.size() - at);
  switch (random() % 7) {
    case 0:
      if (!input.empty()) input[at] ^= static_cast<uint8_t>(1u << (random() % 8));
      break;
    case 1:
      if (!input.empty()) input[at] = static_cast<uint8_t>(random());
      break;
    case 2: {
      const uint64_t edge = kEdges[random() % std::size(kEdges)] + (random() % 3) - 1;
      const size_t width = size_t{1} << (random() % 4);
      for (size_t i = 0; i < width && at + i < input.size(); ++i) {
        input[at + i] = static_cast<uint8_t>(edge >> (8 * i));
      }
      break;
    }
    case 3:
      input.erase(input.begin() + static_cast<ptrdiff_t>(at),
                  input.begin() + static_cast<ptrdiff_t>(at + length));
      break;
    case 4: {
      const Input part(input.begin() + static_cast<ptrdiff_t>(at),
                       input.begin() + static_cast<ptrdiff_t>(at + length));
      const auto place = static_cast<ptrdiff_t>(Below(random, input.size() + 1));
      input.insert(input.begin() + place, part.begin(), part.end());
      break;
    }
    case 5:
      input.resize(at);
      break;
    default:
      input.insert(input.begin() + static_cast<ptrdiff_t>(at), static_cast<uint8_t>(random()));
  }
}

std::vector<Input> ReadCorpus(const char* directory) {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    paths.push_back(entry.path());
  }
  std::ranges::sort(paths);
  std::vector<Input> corpus;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return corpus;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const char* const folder = std::getenv("TMPDIR");
  kept = std::string(folder != nullptr ? folder : "/tmp") + "/fuzz-input";
  for (const int signal : {SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGILL})
    std::signal(signal, KeepInput);
  const rlimit limit{kMaxMemory, kMaxMemory};
  if (::setrlimit(RLIMIT_AS, &limit) != 0) return 2;
  const std::vector<Input> corpus = ReadCorpus(argv[1]);
  if (corpus.empty()) {
    std::fprintf(stderr, "fuzz: no corpus in %s\n", argv[1]);
    return 2;
  }
  for (const Input& input : corpus) {
    current = input;
    LLVMFuzzerTestOneInput(current.data(), current.size());
  }
  const long runs = std::atol(argv[2]);
  std::mt19937_64 random(argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1);
  for (current_run = 0; current_run < runs; ++current_run) {
    current = corpus[Below(random, corpus.size())];
    for (size_t count = 1 + Below(random, 8); count > 0; --count) MutateOnce(current, random);
    if (current.size() > kMaxInput) current.resize(kMaxInput);
    LLVMFuzzerTestOneInput(current.data(), current.size());
  }
  std::printf("fuzz: %zu of the corpus and %ld runs\n", corpus.size(), runs);
  return 0;
}
