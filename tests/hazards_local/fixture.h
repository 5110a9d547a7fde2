// What the hazard tests share: an image of patterned memory, mapped again and again, and remapped
// while something goes on in it.
//
// A round maps a fresh copy at some place, starts the body in a thread of its own, remaps, lets the
// body see that it is over, and compares what the body did not touch with the pattern.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <thread>

#include "unmoor/background_remapper.h"
#include "unmoor/direct_map.h"
#include "unmoor/page_image.h"

namespace hazards {

inline constexpr size_t kMiB = size_t{1} << 20;
inline constexpr size_t kPage = 4096;
constexpr std::chrono::seconds kLimit(60);

inline uint64_t PatternAt(size_t offset) {
  return (offset + 8) * 0x9E3779B97F4A7C15ull;
}

class Hazard : public ::testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;

  // Writes the image: `size` bytes of pattern.
  void MakeImage(size_t size);
  // Maps it afresh; memory() is its begin.
  void Map();
  void Unmap();
  [[nodiscard]] char* memory() const { return memory_; }
  [[nodiscard]] size_t size() const { return size_; }
  [[nodiscard]] const std::string& directory() const { return directory_; }
  [[nodiscard]] std::string PagesFile() const;
  [[nodiscard]] const unmoor::DirectMap& map() const { return *map_; }

  // `written_by_system_calls` as for the ranges given to the remapper.
  [[nodiscard]] unmoor::BackgroundRemapper Start(unmoor::Guard guard = unmoor::Guard::kFreeze,
                                                 bool written_by_system_calls = true,
                                                 unmoor::RemapOptions options = {}) const;

  using Body = std::function<void(char* memory, const std::atomic<bool>& over)>;
  // `rounds` times: map, body in a thread, remap, body told that it is over. Words at offsets for
  // which `touched` says so are the body's.
  void DuringRemap(int rounds, const Body& body, unmoor::Guard guard = unmoor::Guard::kFreeze,
                   bool written_by_system_calls = true);
  void ExpectPattern(size_t from, size_t to) const;

 private:
  std::string parent_, directory_;
  size_t size_ = 0;
  char* memory_ = nullptr;
  std::optional<unmoor::PageImage> image_;
  std::optional<unmoor::DirectMap> map_;
};

// A thread that goes into a vfork, where no signal reaches it. (ThreadSanitizer makes a fork of
// every vfork.)
class ThreadInVfork {
 public:
  ThreadInVfork();
  ThreadInVfork(const ThreadInVfork&) = delete;
  ThreadInVfork& operator=(const ThreadInVfork&) = delete;
  ~ThreadInVfork() { Leave(); }
  void Enter();  // and is there on return
  void Leave();  // and has ended on return

 private:
  int ends_[2] = {-1, -1};  // of the pipe that keeps the child
  std::atomic<bool> go_{false};
  std::atomic<pid_t> tid_{0};
  std::thread thread_;
};

// Runs `body` in a forked child; true when it returned true and nothing killed it.
[[nodiscard]] bool InChild(const std::function<bool()>& body);

}  // namespace hazards
