// NEVER, LATER and READY, and programs that cannot be remapped, or not now: a clear reason each.
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <optional>

#include "agent/page_image.h"
#include "agent/progress_file.h"
#include "agent_fixture.h"
#include "limited_group.h"
#include "os/file.h"
#include "os/own_memory.h"
#include "os/process_control.h"

namespace unmoor::testing_agent {
namespace {

class StatusTest : public AgentTest {
 protected:
  void AwaitGo(int step) const {
    while (signals_->go < step) SleepFor(Nanos(200'000));
  }
  Pid StartMappedSubject(const PageImage& image) {
    const Pid pid = StartSubject([this, &image] {
      Memory memory(image, *signals_);
      signals_->ready = 1;
      AwaitGo(1);
      memory.CheckAll("at the end");
    });
    AwaitReady(1);
    return pid;
  }
};

TEST_F(StatusTest, APlainProcessIsReady) {
  const auto status = QueryStatus(OwnPid());
  ASSERT_TRUE(status);
  EXPECT_EQ(status->status, Status::kReady);
  EXPECT_EQ(status->direct_mapped, Bytes(0));
  EXPECT_FALSE(status->agent);
}

TEST_F(StatusTest, AnAbsentProcessIsTheUsersMistake) {
  const Pid pid = StartSubject([] {});
  ExpectGoodEnd(pid);
  const auto status = QueryStatus(pid);
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().kind(), ErrorKind::kUser);
  EXPECT_EQ(status.error().message(), fmt::format("no process {}", pid.value));
  const auto remapped = RemapProcess(pid, {}, {});
  ASSERT_FALSE(remapped);
  EXPECT_EQ(remapped.error().kind(), ErrorKind::kUser);
}

TEST_F(StatusTest, AZombieIsNeverReady) {
  const Pid pid = StartSubject([] {});
  ASSERT_TRUE(WaitUntil([&] {
    const auto process = ReadProcess(pid);
    return process && process->state == 'Z';
  }));
  const auto status = QueryStatus(pid);
  ASSERT_TRUE(status);
  EXPECT_EQ(status->status, Status::kNever);
  EXPECT_NE(status->reason.find("has ended"), std::string::npos) << status->reason;
  const auto remapped = RemapProcess(pid, {}, {});
  ASSERT_FALSE(remapped);
  EXPECT_EQ(remapped.error().kind(), ErrorKind::kUser);
  ExpectGoodEnd(pid);
}

TEST_F(StatusTest, AKernelThreadIsNeverReady) {
  const auto process = ReadProcess(Pid{2});
  if (!process || !process->kernel_thread) GTEST_SKIP() << "process 2 is no kernel thread here";
  const auto status = QueryStatus(Pid{2});
  ASSERT_TRUE(status);
  EXPECT_EQ(status->status, Status::kNever);
  EXPECT_NE(status->reason.find("kernel thread"), std::string::npos) << status->reason;
}

TEST_F(StatusTest, LaterSaysHowMuchIsLeftAndIsRightWhoeverMappedIt) {
  const PageImage image = MakePageImage(directory_, 1024);
  const Pid pid = StartMappedSubject(image);
  const auto status = QueryStatus(pid);
  ASSERT_TRUE(status);
  EXPECT_EQ(status->status, Status::kLater);
  EXPECT_EQ(status->direct_mapped, Bytes(1024 * kPageSize));
  EXPECT_EQ(status->direct_mapped_data, Bytes(1024 * kPageSize / 8 * 7));
  EXPECT_EQ(status->images, std::vector<std::string>{image.path});
  // As another tool leaves it: CRIU's own page file, renamed, deleted.
  EXPECT_TRUE(RemoveFile(image.path));
  const auto deleted = QueryStatus(pid);
  ASSERT_TRUE(deleted);
  EXPECT_EQ(deleted->status, Status::kLater);
  const auto report = RemapProcess(pid, {}, {});
  ASSERT_TRUE(report) << report.error().message();
  ExpectReady(pid);
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

TEST_F(StatusTest, WaitingTimesOut) {
  const PageImage image = MakePageImage(directory_, 64);
  const Pid pid = StartMappedSubject(image);
  const auto status = WaitReady(pid, Nanos(30'000'000), {});
  ASSERT_TRUE(status);
  EXPECT_EQ(status->status, Status::kLater);
  signals_->go = 1;
  ExpectGoodEnd(pid);
}

TEST_F(StatusTest, WhatKilledWritersLeftIsForgotten) {
  const std::string run = directory_ + "/run";
  ASSERT_TRUE(MakeDirectory(run));
  const Pid gone = StartSubject([] {});
  ExpectGoodEnd(gone);
  const int own = OwnPid().value;
  const std::vector<std::string> stay = {fmt::format("7.json.{}", own), "7.json.x", "letter"};
  for (const std::string& name : stay) ASSERT_TRUE(WriteFile(run + "/" + name, ""));
  ASSERT_TRUE(WriteFile(fmt::format("{}/{}.json", run, gone.value), "{}"));
  for (const char* kind : {"json", "image"}) {
    ASSERT_TRUE(WriteFile(fmt::format("{}/{}.{}.{}", run, own, kind, gone.value), "{"));
  }
  ForgetEndedProcesses();
  EXPECT_EQ(ListDirectory(run).value(), stay);
}

TEST(PageImages, AreToldByTheirNames) {
  const auto maps = [](const char* name, bool shared = false, uint64_t inode = 7) {
    VmaInfo vma;
    vma.name = name;
    vma.shared = shared;
    vma.inode = inode;
    return MapsPageImage(vma);
  };
  EXPECT_TRUE(maps("/a/b/layers/0f3.pages"));
  EXPECT_TRUE(maps("/a/b/layers/0f3.pages (deleted)"));
  EXPECT_TRUE(maps("/somewhere/pages-12.img"));
  EXPECT_FALSE(maps("/a/b/layers/0f3.pages", true));
  EXPECT_FALSE(maps("/a/b/layers/0f3.pages", false, 0));
  EXPECT_FALSE(maps("/a/b/other/0f3.pages"));
  EXPECT_FALSE(maps("/a/b/layers/0f3.index"));
  EXPECT_FALSE(maps("/somewhere/pages-.img"));
  EXPECT_FALSE(maps("/somewhere/pages-1x.img"));
  EXPECT_FALSE(maps("/somewhere/mypages-1.img"));
  EXPECT_FALSE(maps("[heap]"));
}

TEST_F(StatusTest, ATracedProcessGivesAClearErrorAndIsUnhurt) {
  const PageImage image = MakePageImage(directory_, 1024);
  const Pid pid = StartMappedSubject(image);
  const pid_t tracer = ::fork();
  if (tracer == 0) {
    if (::ptrace(PTRACE_SEIZE, pid.value, nullptr, nullptr) != 0) ::_exit(1);
    signals_->child = 1;
    AwaitGo(1);
    ::_exit(0);
  }
  ASSERT_TRUE(WaitUntil([&] { return signals_->child == 1; }));
  const auto report = RemapProcess(pid, {}, {});
  ASSERT_FALSE(report);
  EXPECT_NE(report.error().message().find("trace"), std::string::npos) << report.error().message();
  EXPECT_TRUE(MapsImages(pid));
  signals_->go = 1;
  AwaitEnd(Pid{tracer});
  ExpectGoodEnd(pid);
}

// What keeps a remap from going on: the agent says so, stays, and goes on when it can.
class ObstacleTest : public StatusTest {
 protected:
  // `begin` and `end` it, in the subject; the agent calls it `name`.
  void Run(const std::function<bool()>& begin, const std::function<void()>& end,
           const std::string& name, uint64_t pages = 1024) {
    const PageImage image = MakePageImage(directory_, pages);
    const Pid pid = StartSubject([&] {
      Memory memory(image, *signals_);
      if (!begin()) {
        signals_->child = 1;
        ::_exit(0);
      }
      signals_->ready = 1;
      AwaitGo(1);
      memory.CheckAll("meanwhile");
      end();
      signals_->ready = 2;
      AwaitGo(2);
      memory.CheckAll("at the end");
    });
    ASSERT_TRUE(WaitUntil([&] { return signals_->ready == 1 || signals_->child == 1; }));
    if (signals_->child == 1) {
      AwaitEnd(pid);
      GTEST_SKIP() << name << " is not available here";
    }
    const auto report = RemapProcess(pid, {}, {});
    ASSERT_FALSE(report);
    EXPECT_NE(report.error().message().find(name), std::string::npos) << report.error().message();
    const auto status = QueryStatus(pid);
    ASSERT_TRUE(status);
    EXPECT_EQ(status->status, Status::kLater);
    EXPECT_NE(status->reason.find(name), std::string::npos) << status->reason;
    ExpectRemapOnceRemoved(pid);
  }

  // Told to go on, the program removes what is in the way.
  void ExpectRemapOnceRemoved(Pid pid) {
    signals_->go = 1;
    AwaitReady(2);
    const auto again = RemapProcess(pid, {}, {});
    EXPECT_TRUE(again) << again.error().message();
    ExpectReady(pid);
    signals_->go = 2;
    ExpectGoodEnd(pid);
  }
};

// Buffers of asynchronous I/O must not move.
TEST_F(ObstacleTest, IoUring) {
  static int ring = -1;
  Run(
      [] {
        io_uring_params parameters{};
        ring = static_cast<int>(::syscall(SYS_io_uring_setup, 4, &parameters));
        return ring >= 0;
      },
      [] { ::close(ring); }, "io_uring");
}

TEST_F(ObstacleTest, LinuxAio) {
  static aio_context_t context = 0;
  Run([] { return ::syscall(SYS_io_setup, 4, &context) == 0; },
      [] { ::syscall(SYS_io_destroy, context); }, "Linux AIO");
}

// The kernel would kill the program: direct-mapped pages can be dropped, anonymous ones cannot.
TEST_F(ObstacleTest, TheMemoryLimitOfTheProgramsControlGroup) {
  const LimitedGroup group(uint64_t{96} << 20);
  if (!group.made()) GTEST_SKIP() << "cannot make a control group that limits memory";
  Run([&] { return group.Enter(); },
      [&] {
        if (!group.SetLimit(uint64_t{512} << 20)) signals_->Fail("cannot raise the limit");
      },
      group.directory(), 40960);
}

// As many mappings as the process may have, but for some; gone with this.
class ManyMappings {
 public:
  explicit ManyMappings(size_t spare) {
    pages_ = static_cast<char*>(
        ::mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    Use(MaxMapCount() - spare - ReadMaps(OwnPid())->size());
  }
  ManyMappings(const ManyMappings&) = delete;
  ManyMappings& operator=(const ManyMappings&) = delete;
  ~ManyMappings() { ::munmap(pages_, size_); }

  // Two are made at a time. False: there are no more.
  bool Use(size_t count) {
    for (; count > 1; count -= 2, next_ += 2 * kPageSize) {
      if (::mprotect(pages_ + next_, kPageSize, PROT_READ) != 0) return false;
    }
    return true;
  }

 private:
  const size_t size_ = 2 * MaxMapCount() * kPageSize;
  char* pages_ = nullptr;
  size_t next_ = kPageSize;
};

TEST_F(ObstacleTest, NoMappingsToSpare) {
  std::optional<ManyMappings> many;
  Run([&] { return many.emplace(50).Use(0); }, [&] { many.reset(); }, "vm.max_map_count");
}

TEST_F(ObstacleTest, GivenBackWithoutAMappingToSpareReadsZero) {
  const PageImage image = MakePageImage(directory_, 1024);
  const Pid pid = StartSubject([&] {
    Memory memory(image, *signals_);
    std::optional<ManyMappings> many(std::in_place, 50);
    signals_->ready = 1;
    AwaitGo(1);
    if (many->Use(100)) signals_->Fail("there are mappings to spare");
    memory.GiveBack(100, 8, MADV_DONTNEED);
    memory.CheckAll("after giving back");
    many.reset();
    signals_->ready = 2;
    AwaitGo(2);
    memory.CheckAll("at the end");
  });
  AwaitReady(1);
  const auto report = RemapProcess(pid, {}, {});
  ASSERT_FALSE(report);
  ExpectRemapOnceRemoved(pid);
}

}  // namespace
}  // namespace unmoor::testing_agent
