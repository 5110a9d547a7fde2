// torture: rounds of writers on direct-mapped memory that is remapped under them, until so many
// operations were done or so much time has passed. Ends with one JSON line, or with a line that
// says what was lost and how to see it again.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <thread>
#include <vector>

#include "failure.h"
#include "pages.h"
#include "round.h"

namespace torture {
namespace {

// A file with known pages, opened O_DIRECT; -1 where its file system has no such thing.
int OpenDirectFile(const std::string& directory) {
  const std::string path = directory + "/direct";
  std::vector<uint64_t> content(kDirectPages * pages::kWords);
  for (size_t i = 0; i < kDirectPages; ++i) {
    pages::Fill(&content[i * pages::kWords], kDirectNumber + i, 1);
  }
  FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) Fail("cannot write %s", path.c_str());
  std::fwrite(content.data(), pages::kSize, kDirectPages, file);
  std::fclose(file);
  return open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
}

void Print(const Options& options, const Totals& totals, double seconds) {
  const Tally& t = totals.tally;
  std::printf(
      "{\"seed\": %llu, \"rounds\": %llu, \"operations\": %llu, \"seconds\": %.1f, "
      "\"page_writes\": %llu, \"remapped_bytes\": %llu, \"windows\": %llu, \"aborted\": %llu, "
      "\"faults_caught\": %llu, \"cancelled\": %llu, \"checkpoints\": %llu, "
      "\"longest_pause_us\": %.1f, \"longest_guard_us\": %.1f, \"given_back\": %llu, "
      "\"moved\": %llu, \"protected\": %llu, \"mapped_over\": %llu, \"forks\": %llu, "
      "\"spawned\": %llu, \"threads_born\": %llu, \"calls\": %llu, \"direct_reads\": %llu, "
      "\"probes\": %llu, \"signals\": %llu}\n",
      (unsigned long long)options.seed, (unsigned long long)totals.rounds,
      (unsigned long long)t.operations, seconds, (unsigned long long)t.writes,
      (unsigned long long)totals.bytes, (unsigned long long)totals.windows,
      (unsigned long long)totals.aborted, (unsigned long long)totals.faults_caught,
      (unsigned long long)totals.cancelled, (unsigned long long)totals.checkpoints,
      static_cast<double>(totals.longest_pause_ns) / 1e3,
      static_cast<double>(totals.longest_guard_ns) / 1e3, (unsigned long long)t.given_back,
      (unsigned long long)t.moved, (unsigned long long)t.protected_, (unsigned long long)t.covered,
      (unsigned long long)t.forks, (unsigned long long)t.spawned, (unsigned long long)t.threads,
      (unsigned long long)t.calls, (unsigned long long)t.direct, (unsigned long long)t.probes,
      (unsigned long long)t.signals);
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  std::fprintf(stderr, "torture: seed %llu\n", (unsigned long long)options.seed);
  SetRun(options.seed);
  std::string directory = options.directory + "/unmoor-torture-XXXXXX";
  if (mkdtemp(directory.data()) == nullptr) Fail("cannot make %s", directory.c_str());
  const int direct_file = OpenDirectFile(directory);
  InstallHandlers();
  // ThreadSanitizer makes its own thread with the program's first one: not within a round.
  std::thread([] {}).join();
  const auto totals = std::make_unique<Totals>();
  const uint64_t began = NowNanos();
  const auto seconds = [&] { return static_cast<double>(NowNanos() - began) / 1e9; };
  if (options.only_round >= 0) {
    RunRound(options, static_cast<uint64_t>(options.only_round), directory, direct_file, *totals);
  } else {
    uint64_t round = 0;
    const auto go_on = [&] {
      return options.hours > 0 ? seconds() < options.hours * 3600
                               : totals->tally.operations < options.operations;
    };
    do {
      RunRound(options, round++, directory, direct_file, *totals);
    } while (go_on());
  }
  close(direct_file);
  std::filesystem::remove_all(directory);
  Print(options, *totals, seconds());
  return 0;
}

}  // namespace
}  // namespace torture

#if defined(__SANITIZE_THREAD__)
// Forked children end by _exit with threads that only their parent has.
extern "C" const char* __tsan_default_options();
extern "C" const char* __tsan_default_options() {
  return "die_after_fork=0:report_thread_leaks=0";
}
#endif

int main(int argc, char** argv) {
  return torture::Main(argc, argv);
}
