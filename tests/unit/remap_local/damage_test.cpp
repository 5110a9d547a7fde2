// An image that is damaged or truncated under its program: that range stays as it is, the program
// is told which and why, everything else goes on.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <thread>

#include "fixture.h"

namespace hazards {
namespace {

using unmoor::RemapStatus;
using unmoor::StatusCode;

class Damage : public Hazard {
 protected:
  // Where in the file the byte at `offset` of the memory is.
  [[nodiscard]] off_t FindInFile(size_t offset) const {
    const int file = ::open(PagesFile().c_str(), O_RDONLY);
    const off_t data = ::lseek(file, 0, SEEK_DATA);
    ::close(file);
    return data + static_cast<off_t>(offset);
  }
};

TEST_F(Damage, ABlockThatDoesNotMatchItsHashStaysAndIsNamed) {
  MakeImage(16 * kMiB);
  Map();
  const int file = ::open(PagesFile().c_str(), O_WRONLY);
  ASSERT_EQ(::pwrite(file, "damaged", 7, FindInFile(5 * kMiB + 100)), 7);
  ::close(file);
  auto remapper = Start();
  const auto status = remapper.Wait(kLimit);
  EXPECT_EQ(status.code(), StatusCode::kDamaged);
  EXPECT_NE(status.message().find(PagesFile()), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("hash"), std::string::npos) << status.message();
  // Where in the file, and in memory: the 64 KiB are named, the 2 MiB around them stay.
  const off_t block = FindInFile(5 * kMiB + 100) / 65536 * 65536;
  EXPECT_NE(status.message().find("offset " + std::to_string(block)), std::string::npos)
      << status.message();
  const auto stays = reinterpret_cast<uintptr_t>(memory()) + 4 * kMiB;
  char range[64];
  std::snprintf(range, sizeof(range), "%lx-%lx", stays, stays + 2 * kMiB);
  EXPECT_NE(status.message().find(range), std::string::npos) << status.message();
  const auto progress = remapper.progress();
  EXPECT_EQ(progress.status, RemapStatus::kNever);
  EXPECT_EQ(progress.refused_bytes, 2 * kMiB);
  EXPECT_EQ(progress.done_bytes, 14 * kMiB);
  const auto process = unmoor::QueryStatus();
  ASSERT_TRUE(process.ok());
  EXPECT_EQ(process->status, RemapStatus::kNever);
  EXPECT_EQ(process->direct_mapped_bytes, 2 * kMiB);
  ExpectPattern(0, 4 * kMiB);
  ExpectPattern(6 * kMiB, size());
}

TEST_F(Damage, WithoutVerificationNobodyLooks) {
  MakeImage(4 * kMiB);
  Map();
  const int file = ::open(PagesFile().c_str(), O_WRONLY);
  ASSERT_EQ(::pwrite(file, "damaged", 7, FindInFile(kMiB)), 7);
  ::close(file);
  unmoor::RemapOptions options;
  options.verify = false;
  EXPECT_TRUE(Start(unmoor::Guard::kFreeze, true, options).Wait(kLimit).ok());
}

// Pages the program has written do not come from the image: damage there is nobody's loss.
TEST_F(Damage, UnderPagesOfThePrograms0wnDoesNotMatter) {
  MakeImage(4 * kMiB);
  Map();
  for (size_t at = kMiB; at < kMiB + 65536; at += kPage) memory()[at] = 1;
  const int file = ::open(PagesFile().c_str(), O_WRONLY);
  ASSERT_EQ(::pwrite(file, "damaged", 7, FindInFile(kMiB + 9000)), 7);
  ::close(file);
  EXPECT_TRUE(Start().Wait(kLimit).ok());
}

TEST_F(Damage, ATruncatedImageIsReportedNotRunInto) {
  for (const bool paused : {false, true}) {
    MakeImage(16 * kMiB);
    Map();
    unmoor::RemapOptions options;
    options.bytes_per_second = 1 << 20;
    std::optional<unmoor::BackgroundRemapper> remapper;
    if (paused) remapper.emplace(Start(unmoor::Guard::kFreeze, true, options));
    if (paused) ::usleep(50'000);
    ASSERT_EQ(::truncate(PagesFile().c_str(), FindInFile(4 * kMiB)), 0);
    if (!paused) remapper.emplace(Start());
    remapper->FinishNow();
    const auto status = remapper->Wait(kLimit);
    EXPECT_EQ(status.code(), StatusCode::kDamaged) << status.message();
    EXPECT_EQ(remapper->progress().status, RemapStatus::kNever);
    EXPECT_GE(remapper->progress().refused_bytes, 2 * kMiB);
    ExpectPattern(0, 4 * kMiB);
    remapper.reset();
    // The program's own access there is its own SIGBUS, not zeros.
    Unmap();
  }
}

// Without the layer's index nothing tells that there was data: the pages would come out as zeros.
TEST_F(Damage, WhatIsCutOffAnImageGivenByItsAddressesAloneStays) {
  MakeImage(16 * kMiB);
  Map();
  ASSERT_EQ(::truncate(PagesFile().c_str(), FindInFile(4 * kMiB)), 0);
  const unmoor::RemapRange range{{memory(), size()}};
  auto remapper = unmoor::BackgroundRemapper::Start(std::span(&range, 1));
  ASSERT_TRUE(remapper.ok()) << remapper.status().message();
  const auto status = remapper->Wait(kLimit);
  EXPECT_EQ(status.code(), StatusCode::kDamaged) << status.message();
  EXPECT_NE(status.message().find("truncated"), std::string::npos) << status.message();
  const auto process = unmoor::QueryStatus();
  ASSERT_TRUE(process.ok());
  EXPECT_EQ(process->status, RemapStatus::kNever);
  EXPECT_EQ(process->direct_mapped_bytes, 12 * kMiB);
  ExpectPattern(0, 4 * kMiB);
}

}  // namespace
}  // namespace hazards
