// BackgroundRemapper: what its header promises, beyond the hazards.
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <ctime>
#include <fstream>
#include <thread>
#include <vector>

#include "fixture.h"

namespace hazards {
namespace {

using unmoor::BackgroundRemapper;
using unmoor::Guard;
using unmoor::RemapOptions;
using unmoor::RemapRange;
using unmoor::RemapStatus;
using unmoor::StatusCode;

class Remapper : public Hazard {};

size_t MappingsIn(const char* begin, size_t size) {
  std::ifstream maps("/proc/self/maps");
  size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    const uint64_t from = std::stoull(line, nullptr, 16);
    const auto at = reinterpret_cast<uint64_t>(begin);
    if (from >= at && from < at + size) ++count;
  }
  return count;
}

void WriteTheSame(char* at) {
  volatile char* const byte = at;
  *byte = *byte;
}

bool MapsAFile(const char* at) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    size_t dash = 0;
    const uint64_t begin = std::stoull(line, &dash, 16);
    const uint64_t end = std::stoull(line.substr(dash + 1), nullptr, 16);
    const auto address = reinterpret_cast<uint64_t>(at);
    if (begin <= address && address < end) return line.ends_with(".pages");
  }
  return false;
}

size_t ThreadCount() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("Threads:")) return std::stoul(line.substr(8));
  }
  return 0;
}

TEST_F(Remapper, MemoryIsOneAnonymousMappingAfterwardsAndNothingIsLeft) {
  MakeImage(40 * kMiB + 3 * kPage);
  Map();
  const size_t threads = ThreadCount();
  auto remapper = Start();
  ASSERT_TRUE(remapper.Wait(kLimit).ok());
  const auto progress = remapper.progress();
  EXPECT_EQ(progress.status, RemapStatus::kReady);
  EXPECT_EQ(progress.done_bytes, progress.total_bytes);
  EXPECT_EQ(progress.done_bytes, size());
  EXPECT_GT(progress.windows, 0u);
  EXPECT_EQ(MappingsIn(memory(), size()), 1u);
  ExpectPattern(0, size());
  const auto status = unmoor::QueryStatus();
  ASSERT_TRUE(status.ok());
  EXPECT_EQ(status->status, RemapStatus::kReady);
  for (int i = 0; i < 3000 && ThreadCount() != threads; ++i) ::usleep(10'000);
  EXPECT_EQ(ThreadCount(), threads);
}

TEST_F(Remapper, TheImageIsNotNeededOnceItIsReady) {
  MakeImage(4 * kMiB);
  Map();
  ASSERT_TRUE(Start().Wait(kLimit).ok());
  ASSERT_EQ(::truncate(PagesFile().c_str(), 0), 0);
  ExpectPattern(0, size());
}

TEST_F(Remapper, ADeletedImageIsRemappedWithoutADirectMapToAsk) {
  MakeImage(4 * kMiB);
  Map();
  ASSERT_EQ(::unlink(PagesFile().c_str()), 0);
  const RemapRange range{{memory(), size()}};
  auto remapper = BackgroundRemapper::Start(std::span(&range, 1));
  ASSERT_TRUE(remapper.ok());
  EXPECT_TRUE(remapper->Wait(kLimit).ok());
  ExpectPattern(0, size());
}

TEST_F(Remapper, OrdersAndThreadsAllFinish) {
  MakeImage(24 * kMiB);
  for (const auto order : {unmoor::RemapOrder::kGiven, unmoor::RemapOrder::kSequential,
                           unmoor::RemapOrder::kHotFirst}) {
    for (const int threads : {1, 2, 5}) {
      Map();
      WriteTheSame(memory() + 20 * kMiB);
      RemapOptions options;
      options.order = order;
      options.threads = threads;
      auto remapper = Start(Guard::kFreeze, true, options);
      ASSERT_TRUE(remapper.Wait(kLimit).ok());
      EXPECT_EQ(remapper.progress().done_bytes, size());
      EXPECT_EQ(MappingsIn(memory(), size()), 1u) << threads << " threads";
      ExpectPattern(0, size());
      Unmap();
    }
  }
}

// What was written most is anonymous first. (Heat is looked at by 32 MiB.)
TEST_F(Remapper, TheHotPartComesFirstWhereAskedFor) {
  MakeImage(160 * kMiB);
  for (const auto order : {unmoor::RemapOrder::kSequential, unmoor::RemapOrder::kHotFirst}) {
    Map();
    const size_t hot = 128 * kMiB;
    for (size_t at = hot; at < hot + 8 * kMiB; at += kPage) WriteTheSame(memory() + at);
    RemapOptions options;
    options.order = order;
    options.bytes_per_second = 64 << 20;
    auto remapper = Start(Guard::kFreeze, true, options);
    while (remapper.progress().windows == 0) ::usleep(1000);
    remapper.Pause();
    const bool first = order == unmoor::RemapOrder::kHotFirst;
    EXPECT_EQ(MapsAFile(memory()), first);
    EXPECT_EQ(MapsAFile(memory() + hot + 8 * kMiB - kPage), !first);
    remapper.FinishNow();
    EXPECT_TRUE(remapper.Wait(kLimit).ok());
    ExpectPattern(0, size());
    Unmap();
  }
}

// A pace is a promise of at most so much; a machine under load only makes it less.
TEST_F(Remapper, PaceAndShareOfACpuAreKept) {
  MakeImage(256 * kMiB);
  const auto cpu = [] {
    timespec now{};
    ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
  };
  for (const bool share : {false, true}) {
    Map();
    RemapOptions options;
    if (share) options.cpu_share = 0.2;
    if (!share) options.bytes_per_second = 256 << 20;
    const double cpu_before = cpu();
    const auto before = std::chrono::steady_clock::now();
    auto remapper = Start(Guard::kFreeze, true, options);
    ASSERT_TRUE(remapper.Wait(kLimit).ok());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - before;
    const double used = cpu() - cpu_before;
    const double least = share ? used / options.cpu_share : 1.0;
    EXPECT_GE(took.count(), 0.7 * least) << (share ? "cpu_share" : "bytes_per_second");
    ExpectPattern(0, size());
    Unmap();
  }
}

TEST_F(Remapper, SeveralAtOnceWithWritersLoseNothing) {
  MakeImage(16 * kMiB);
  for (int round = 0; round < 6; ++round) {
    Map();
    std::atomic<bool> over{false};
    std::vector<std::thread> writers;
    for (size_t w = 0; w < 3; ++w) {
      writers.emplace_back([&, w] {
        std::vector<uint64_t> last(size() / kPage);
        for (uint64_t n = 1; !over; ++n) {
          const size_t page = n * (w + 3) * 7919 % last.size();
          auto* word = reinterpret_cast<volatile uint64_t*>(memory() + page * kPage + 8 * (w + 1));
          if (last[page] != 0) {
            ASSERT_EQ(*word, last[page]);
          }
          *word = last[page] = n << 8 | w;
        }
      });
    }
    std::vector<BackgroundRemapper> remappers;
    for (size_t i = 0; i < 4; ++i) {
      const RemapRange range{{memory() + i * 4 * kMiB, 4 * kMiB}, i % 2 == 0};
      RemapOptions options;
      options.guard = Guard::kFault;
      options.threads = 1 + static_cast<int>(i % 2);
      auto remapper = BackgroundRemapper::Start(map(), std::span(&range, 1), options);
      ASSERT_TRUE(remapper.ok()) << remapper.status().message();
      remappers.push_back(std::move(*remapper));
    }
    for (auto& remapper : remappers) EXPECT_TRUE(remapper.Wait(kLimit).ok());
    over = true;
    for (auto& writer : writers) writer.join();
    Unmap();
  }
}

TEST_F(Remapper, PausesResumesAndKeepsThePace) {
  MakeImage(48 * kMiB);
  Map();
  RemapOptions options;
  options.bytes_per_second = 16 << 20;
  auto remapper = Start(Guard::kFreeze, true, options);
  remapper.Pause();
  EXPECT_EQ(remapper.Wait(std::chrono::milliseconds(30)).code(), StatusCode::kTimedOut);
  EXPECT_EQ(remapper.progress().status, RemapStatus::kLater);
  EXPECT_EQ(remapper.progress().reason, "paused");
  remapper.Resume();
  // At this pace it takes three seconds; and this is not one of them.
  EXPECT_EQ(remapper.Wait(std::chrono::milliseconds(100)).code(), StatusCode::kTimedOut);
  remapper.FinishNow();
  EXPECT_TRUE(remapper.Wait(kLimit).ok());
  ExpectPattern(0, size());
}

TEST_F(Remapper, CancelKeepsWhatIsDoneAndAnotherFinishes) {
  MakeImage(100 * kMiB);  // more than is swapped at once
  Map();
  RemapOptions options;
  options.bytes_per_second = 64 << 20;
  auto remapper = Start(Guard::kFreeze, true, options);
  while (remapper.progress().done_bytes == 0) ::usleep(1000);
  remapper.Cancel();
  EXPECT_EQ(remapper.Wait(kLimit).code(), StatusCode::kCancelled);
  const auto progress = remapper.progress();
  EXPECT_EQ(progress.status, RemapStatus::kLater);
  EXPECT_LT(progress.done_bytes, size());
  {
    BackgroundRemapper ended = std::move(remapper);
  }
  ASSERT_TRUE(Start().Wait(kLimit).ok());
  EXPECT_EQ(MappingsIn(memory(), size()) > 0, true);
  ExpectPattern(0, size());
}

TEST_F(Remapper, CompletionIsToldByCallbackAndEventfd) {
  MakeImage(4 * kMiB);
  Map();
  std::atomic<int> told{0};
  RemapOptions options;
  options.completion_eventfd = ::eventfd(0, EFD_CLOEXEC);
  options.on_complete = [&](RemapStatus status) {
    if (status == RemapStatus::kReady) ++told;
  };
  auto remapper = Start(Guard::kFreeze, true, options);
  pollfd waiting{options.completion_eventfd, POLLIN, 0};
  while (::poll(&waiting, 1, 60'000) < 0) ASSERT_EQ(errno, EINTR);  // windows interrupt it
  EXPECT_EQ(waiting.revents, POLLIN);
  EXPECT_TRUE(remapper.Wait(kLimit).ok());
  EXPECT_EQ(told, 1);
  ::close(options.completion_eventfd);
}

TEST_F(Remapper, BadRangesAndOptionsAreRefused) {
  MakeImage(4 * kMiB);
  Map();
  const auto code = [&](std::vector<RemapRange> ranges, RemapOptions options = {}) {
    return BackgroundRemapper::Start(ranges, options).status().code();
  };
  EXPECT_EQ(code({{{memory() + 1, kPage}}}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({{{memory(), kPage - 1}}}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({{{memory(), 0}}}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({{{memory(), 2 * kPage}}, {{memory() + kPage, kPage}}}),
            StatusCode::kInvalidArgument);
  RemapOptions none;
  none.threads = 0;
  EXPECT_EQ(code({{{memory(), kPage}}}, none), StatusCode::kInvalidArgument);
  RemapOptions share;
  share.cpu_share = 0;
  EXPECT_EQ(code({{{memory(), kPage}}}, share), StatusCode::kInvalidArgument);
  auto holder = Start();
  holder.Pause();
  EXPECT_EQ(code({{{memory(), kPage}}}), StatusCode::kInvalidArgument);
}

TEST_F(Remapper, WithoutAddressSpaceItStandsAndGoesOnWhenAsked) {
  MakeImage(64 * kMiB);
  Map();
  rlimit before{};
  ::getrlimit(RLIMIT_AS, &before);
  std::ifstream statm("/proc/self/statm");
  size_t pages = 0;
  statm >> pages;
  const rlimit tight{pages * kPage + 48 * kMiB, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_AS, &tight), 0);
  auto remapper = Start();
  const auto standing = remapper.Wait(kLimit);
  const auto progress = remapper.progress();
  ::setrlimit(RLIMIT_AS, &before);
  EXPECT_EQ(standing.code(), StatusCode::kNoMemory) << standing.message();
  EXPECT_EQ(progress.status, RemapStatus::kLater);
  EXPECT_FALSE(progress.reason.empty());
  EXPECT_FALSE(progress.running);
  remapper.Resume();
  EXPECT_TRUE(remapper.Wait(kLimit).ok());
  ExpectPattern(0, size());
}

// By exec, since a process that gives up its rights by setuid alone may not read its own /proc.
TEST_F(Remapper, WorksAsNobody) {
  if (::getuid() != 0) GTEST_SKIP() << "runs unprivileged anyway";
  if (::access("/usr/bin/setpriv", X_OK) != 0) GTEST_SKIP() << "no setpriv";
  char self[4096] = {};
  ASSERT_GT(::readlink("/proc/self/exe", self, sizeof(self) - 1), 0);
  const std::string command =
      std::string("cp ") + self + " " + directory() + ".bin && chmod 755 " + directory() +
      ".bin && chmod 711 $(dirname " + directory() + ") && " +
      "setpriv --reuid=65534 --regid=65534 --clear-groups " + directory() +
      ".bin --gtest_filter=Remapper.MemoryIs*:Remapper.SeveralAtOnce*:Tracker.Sur* > " +
      directory() + ".out 2>&1";
  const int status = std::system(command.c_str());
  std::ifstream output(directory() + ".out");
  EXPECT_EQ(status, 0) << std::string(std::istreambuf_iterator<char>(output), {});
}

}  // namespace
}  // namespace hazards
