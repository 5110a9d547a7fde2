// Lists of mappings as /proc gives them.
#include "os/procfs.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "os/process_control.h"

namespace unmoor {
namespace {

VaddrRange Range(uint64_t begin, uint64_t end) {
  return {Vaddr(begin), Vaddr(end)};
}

TEST(ParseVmas, ReadsMapsAndSmaps) {
  const auto vmas = ParseVmas(
      "1000-3000 rw-p 00005000 fd:01 77                         /a file\n"
      "Rss:                   8 kB\n"
      "VmFlags: rd wr mr uw\n"
      "3000-4000 r-xs 00000000 00:00 0\n",
      "smaps");
  ASSERT_TRUE(vmas);
  ASSERT_EQ(vmas->size(), 2U);
  EXPECT_EQ((*vmas)[0].range, Range(0x1000, 0x3000));
  EXPECT_EQ((*vmas)[0].offset.value, 0x5000U);
  EXPECT_EQ((*vmas)[0].name, "/a file");
  EXPECT_TRUE((*vmas)[0].HasFlag("uw"));
  EXPECT_TRUE((*vmas)[1].shared);
  EXPECT_TRUE((*vmas)[1].vm_flags.empty());
}

// Between two reads of the list a mapping was split, or joined its neighbour.
TEST(ParseVmas, WhatShowsTwiceIsThereOnce) {
  const auto vmas = ParseVmas(
      "1000-9000 rw-p 00001000 fd:01 77 /a\n"
      "VmFlags: rd wr uw\n"
      "1000-3000 rw-p 00001000 fd:01 77 /a\n"
      "VmFlags: rd\n"
      "5000-b000 rw-p 00005000 fd:01 77 /a\n"
      "VmFlags: wr\n",
      "smaps");
  ASSERT_TRUE(vmas);
  ASSERT_EQ(vmas->size(), 2U);
  EXPECT_EQ((*vmas)[0].range, Range(0x1000, 0x9000));
  EXPECT_TRUE((*vmas)[0].HasFlag("uw"));
  EXPECT_EQ((*vmas)[1].range, Range(0x9000, 0xb000));
  EXPECT_EQ((*vmas)[1].offset.value, 0x9000U);
  EXPECT_FALSE((*vmas)[1].HasFlag("rd"));
}

// The kernel's list ends early when a thread ends as it is listed. A living thread behind some that
// end is missing from about one list in a thousand here.
TEST(ReadThreads, NoneIsMissedForOthersThatEnd) {
  std::atomic<bool> over{false};
  std::atomic<int> living{0};
  std::thread maker([&] {
    while (!over) {
      std::vector<std::thread> ending;
      for (int i = 0; i < 8; ++i) ending.emplace_back([] {});
      std::atomic<bool> enough{false};
      std::thread stays([&] {
        living = ::gettid();
        while (!enough) ::usleep(50);
        living = 0;
        ::usleep(500);  // whoever looks now saw it before
      });
      for (std::thread& thread : ending) thread.join();
      ::usleep(100);
      enough = true;
      stays.join();
    }
  });
  int lists = 0;
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  while (std::chrono::steady_clock::now() < until) {
    const int thread = living;
    const auto threads = ReadThreads(OwnPid());
    ASSERT_TRUE(threads);
    if (thread == 0 || living != thread) continue;
    ++lists;
    EXPECT_NE(std::ranges::find(*threads, Pid{thread}), threads->end()) << "list " << lists;
  }
  over = true;
  maker.join();
  EXPECT_GT(lists, 0);
}

TEST(ParseVmas, AnythingElseIsAnError) {
  const auto vmas = ParseVmas("no mapping\n", "/proc/1/maps");
  ASSERT_FALSE(vmas);
  EXPECT_EQ(vmas.error().message(), "cannot understand /proc/1/maps: \"no mapping\"");
}

}  // namespace
}  // namespace unmoor
