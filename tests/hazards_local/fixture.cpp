// See fixture.h.
#include "fixture.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

namespace hazards {

using unmoor::BackgroundRemapper;
using unmoor::DirectMap;
using unmoor::Guard;
using unmoor::PageImage;
using unmoor::PageImageWriter;
using unmoor::RemapOptions;
using unmoor::RemapRange;

void Hazard::SetUp() {
  char name[] = "/tmp/unmoor-hazards-XXXXXX";
  ASSERT_NE(::mkdtemp(name), nullptr);
  parent_ = name;
  directory_ = parent_ + "/image";
}

void Hazard::TearDown() {
  map_.reset();
  std::filesystem::remove_all(parent_);
}

void Hazard::MakeImage(size_t size) {
  size_ = size;
  void* at = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(at, MAP_FAILED);
  auto* words = static_cast<uint64_t*>(at);
  for (size_t i = 0; i < size / 8; ++i) words[i] = PatternAt(i * 8);
  auto writer = PageImageWriter::Create(directory_, {.sync = false, .replace = true});
  ASSERT_TRUE(writer.ok()) << writer.status().message();
  ASSERT_TRUE(writer->Add({at, size}).ok());
  const auto report = writer->Publish();
  ASSERT_TRUE(report.ok()) << report.status().message();
  ::munmap(at, size);
  auto image = PageImage::Open(directory_);
  ASSERT_TRUE(image.ok()) << image.status().message();
  image_ = std::move(*image);
}

void Hazard::Map() {
  auto map = DirectMap::Map(*image_, {.placement = unmoor::Placement::kAnywhere});
  ASSERT_TRUE(map.ok()) << map.status().message();
  map_.emplace(std::move(*map));
  memory_ = static_cast<char*>(map_->ranges()[0].memory.begin);
}

void Hazard::Unmap() {
  map_.reset();
}

std::string Hazard::PagesFile() const {
  for (const auto& entry : std::filesystem::directory_iterator(directory_ + "/layers")) {
    if (entry.path().extension() == ".pages") return entry.path();
  }
  return {};
}

BackgroundRemapper Hazard::Start(Guard guard, bool written_by_system_calls,
                                 RemapOptions options) const {
  options.guard = guard;
  const RemapRange range{map_->ranges()[0].memory, written_by_system_calls};
  auto remapper = BackgroundRemapper::Start(*map_, std::span(&range, 1), options);
  if (!remapper.ok()) ADD_FAILURE() << remapper.status().message();
  return std::move(*remapper);
}

void Hazard::DuringRemap(int rounds, const Body& body, Guard guard, bool written_by_system_calls) {
  for (int round = 0; round < rounds && !HasFailure(); ++round) {
    Map();
    std::atomic<bool> over{false};
    std::thread thread([&] { body(memory_, over); });
    ::usleep(static_cast<useconds_t>(round * 37 % 1000));
    auto remapper = Start(guard, written_by_system_calls);
    const auto status = remapper.Wait(kLimit);
    over = true;
    thread.join();
    EXPECT_TRUE(status.ok()) << status.message();
    Unmap();
  }
}

void Hazard::ExpectPattern(size_t from, size_t to) const {
  const auto* words = reinterpret_cast<const volatile uint64_t*>(memory_);
  for (size_t at = from; at < to; at += 8) {
    ASSERT_EQ(words[at / 8], PatternAt(at)) << "at offset " << at;
  }
}

ThreadInVfork::ThreadInVfork() {
  if (::pipe(ends_) != 0) std::abort();
  thread_ = std::thread([this] {
    tid_ = ::gettid();
    while (!go_) ::usleep(100);
    const pid_t child = ::vfork();
    if (child == 0) {
      char byte;
      (void)!::read(ends_[0], &byte, 1);
      ::_exit(0);
    }
    ::waitpid(child, nullptr, 0);
  });
  while (tid_ == 0) ::usleep(100);
}

void ThreadInVfork::Enter() {
  go_ = true;
  const std::string children = "/proc/self/task/" + std::to_string(tid_) + "/children";
  for (std::string child; child.empty(); ::usleep(1000)) std::ifstream(children) >> child;
}

void ThreadInVfork::Leave() {
  if (!thread_.joinable()) return;
  go_ = true;
  (void)!::write(ends_[1], "x", 1);
  thread_.join();
  ::close(ends_[0]);
  ::close(ends_[1]);
}

bool InChild(const std::function<bool()>& body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body() ? 0 : 1);
  int status = 0;
  if (::waitpid(child, &status, 0) != child) return false;
  if (WIFSIGNALED(status)) ADD_FAILURE() << "killed by signal " << WTERMSIG(status);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace hazards
