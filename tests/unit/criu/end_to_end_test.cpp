// The CRIU room against the real criu: a small self-checking program is dumped through our page
// server and restored by criu, from CRIU's own format and from a page image mapped directly.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <linux/close_range.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <map>
#include <stdexcept>
#include <thread>

#include "criu/image_codec.h"
#include "criu/metadata.h"
#include "criu/page_images.h"
#include "criu/page_server.h"
#include "criu/rewrite.h"
#include "criu/runner.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/socket.h"
#include "proto/image.pb.h"

namespace unmoor::criu {
namespace {

using ::testing::HasSubstr;

void Require(const Result<>& result) {
  if (!result) throw std::runtime_error(result.error().message());
}

// By value: what a range-for iterates over must outlive the Result it came in.
template <class T>
T Value(Result<T> result) {
  if (!result) throw std::runtime_error(result.error().message());
  return *std::move(result);
}

constexpr uint64_t kMiB = uint64_t{1} << 20;

// Everything into CRIU's own format, but the pages of `diverted` ranges into a sparse file, at the
// file offset equal to the address's distance from the range's start.
class DivertingSink : public PageSink {
 public:
  DivertingSink(const std::string& directory, std::map<PageStreamId, VaddrRange> diverted)
      : images_(directory), diverted_(std::move(diverted)) {
    for (const auto& [id, range] : diverted_) {
      const std::string path = fmt::format("{}/../layer-{}", directory, id.id);
      files_[id] = OpenFile(path, O_RDWR | O_CREAT | O_TRUNC).value();
      Require(Truncate(files_[id].get(), range.size(), path));
    }
  }
  Result<> Open(PageStreamId id) override {
    streams.push_back(id);
    return images_.Open(id);
  }
  Result<> Pages(PageStreamId id, Vaddr at, uint32_t flags,
                 std::span<const std::byte> data) override {
    if (fail_at_pages) return MachineError("the disk is full");
    const auto found = diverted_.find(id);
    if (found == diverted_.end()) return images_.Pages(id, at, flags, data);
    while (!data.empty()) {
      const auto page = data.first(kPageSize);
      if (found->second.Contains(at)) {
        UNMOOR_TRY(WriteExactlyAt(files_[id].get(), page,
                                  FileOffset((at - found->second.begin).value), "layer"));
      } else {
        UNMOOR_TRY(images_.Pages(id, at, flags, page));
      }
      data = data.subspan(kPageSize);
      at = at + Bytes(kPageSize);
    }
    return {};
  }
  Result<> Absent(PageStreamId id, VaddrRange range, uint32_t flags) override {
    return images_.Absent(id, range, flags);
  }
  Result<> Close() override {
    ++closes;
    if (fail_at_close) return MachineError("the disk is full");
    return images_.Finish(false);
  }
  [[nodiscard]] int File(PageStreamId id) const { return files_.at(id).get(); }

  std::vector<PageStreamId> streams;
  int closes = 0;
  bool fail_at_close = false;
  bool fail_at_pages = false;

 private:
  PageImageWriter images_;
  std::map<PageStreamId, VaddrRange> diverted_;
  std::map<PageStreamId, Fd> files_;
};

class CriuEndToEnd : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto criu = FindCriu(std::nullopt, VersionCheck::kNow);
    if (!criu) GTEST_SKIP() << criu.error().message();
    if (::geteuid() != 0) GTEST_SKIP() << "criu needs root";
    criu_ = *criu;
    Require(BecomeSubreaper());
    // Not for the program: what ctest left open (a log that grows) is no part of the checkpoint.
    ASSERT_EQ(::close_range(3, ~0U, CLOSE_RANGE_CLOEXEC), 0);
    root_ = MakeTemporaryDirectory("/tmp", "unmoor-criu-test-").value();
    images_ = root_ + "/criu";
    Require(MakeDirectory(images_));
    beat_path_ = root_ + "/beat";
    Require(WriteFile(beat_path_, std::string(4096, '\0')));
    const Fd fd = OpenFile(beat_path_, O_RDWR).value();
    void* const beat = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    ASSERT_NE(beat, MAP_FAILED);
    beat_ = static_cast<volatile uint64_t*>(beat);
  }

  void TearDown() override {
    KillProgram();
    if (beat_ != nullptr) ::munmap(const_cast<uint64_t*>(beat_), 4096);
    if (!root_.empty()) Require(RemoveTree(root_));
  }

  void Start(const std::string& mib, const std::string& mode = "") {
    const Fd null = OpenFile("/dev/null", O_RDWR).value();
    SpawnOptions options;
    options.argv = {CHECKER_PROGRAM, mib, beat_path_, mode};
    options.stdin_fd = options.stdout_fd = options.stderr_fd = null.get();
    options.new_session = true;
    pid_ = Value(Spawn(options)).pid();
    WaitForRounds(2);
    if (mode == "tree" || mode == "threads") WaitForRounds(2, 3);
    tree_ = Value(ReadTree(pid_));
  }

  // Until the program has verified all its memory `more` times from now.
  void WaitForRounds(uint64_t more, int counter = 0) {
    const uint64_t before = beat_[counter];
    for (int i = 0; i < 2000 && beat_[counter] < before + more; ++i) SleepFor(Nanos(5'000'000));
    ASSERT_GE(beat_[counter], before + more) << "the program does not run";
  }

  void ExpectAliveAndRight(int counter = 0) {
    WaitForRounds(3, counter);
    EXPECT_EQ(beat_[counter + 1], 0u) << "wrong words of memory";
  }

  void KillProgram() {
    if (pid_.value == 0) return;
    const auto tree = ReadTree(pid_);
    for (const Pid pid : tree ? *tree : tree_) ::kill(pid.value, SIGKILL);
    AwaitGone();
  }

  // A zombie keeps its pid, which criu restore wants. We are the reaper of all of them.
  void AwaitGone() {
    for (const Pid pid : tree_) {
      const std::string path = fmt::format("/proc/{}", pid.value);
      for (int i = 0; i < 4000 && Exists(path); ++i) {
        (void)ReapChild(pid);
        SleepFor(Nanos(2'000'000));
      }
      ASSERT_FALSE(Exists(path));
    }
  }

  // The VMA the program verifies.
  VaddrRange Memory(Pid pid) {
    for (const VmaInfo& vma : Value(ReadMaps(pid))) {
      if (vma.range.Contains(Vaddr(beat_[2]))) return vma.range;
    }
    return {};
  }

  Result<CriuOutcome> Dump(DivertingSink& sink, std::vector<std::string> extra = {}) {
    StreamPair sockets = StreamPair::Create().value();
    PageServer server(std::move(sockets.ours), sink);
    std::thread thread([&] { served_ = server.Run(); });
    CriuCommand command;
    command.args = {"dump",        "-t", std::to_string(pid_.value), "-D", images_, "--page-server",
                    "--ps-socket", "3"};
    command.args.insert(command.args.end(), extra.begin(), extra.end());
    command.fds = {{sockets.theirs.get(), 3}};
    command.log_path = root_ + "/dump.log";
    if (abort_soon_) {
      server.Abort("interrupted");
    }
    Result<CriuOutcome> outcome = RunCriu(criu_, command);
    sockets.theirs.Reset();
    thread.join();
    return outcome;
  }

  Result<CriuOutcome> Restore(const std::string& directory, std::vector<std::string> extra = {},
                              std::vector<InheritedFd> fds = {}) {
    CriuCommand command;
    command.args = {"restore", "-d", "-D", directory};
    command.args.insert(command.args.end(), extra.begin(), extra.end());
    command.fds = std::move(fds);
    command.log_path = root_ + "/restore.log";
    return RunCriu(criu_, command);
  }

  // Dump with the checker's memory of each task diverted, rewrite, restore mapped.
  void RoundTripDirect(const std::vector<Pid>& tasks) {
    std::map<PageStreamId, VaddrRange> diverted;
    std::vector<TaskMapping> mappings;
    uint32_t layer = 0;
    for (const Pid pid : tasks) {
      const PageStreamId id{StreamKind::kTask, static_cast<uint64_t>(pid.value)};
      diverted[id] = Memory(pid);
      mappings.push_back(
          {static_cast<uint32_t>(pid.value), {{diverted[id], layer++, FileOffset(0)}}});
    }
    DivertingSink sink(images_, diverted);
    const auto dumped = Dump(sink);
    ASSERT_TRUE(dumped) << dumped.error().message();
    ASSERT_TRUE(served_) << served_.error().message();
    AwaitGone();

    const std::string view = root_ + "/view";
    Require(MakeDirectory(view));
    const auto rewritten = RewriteForDirectMap(images_, view, mappings);
    ASSERT_TRUE(rewritten) << rewritten.error().message();
    std::vector<std::string> extra;
    std::vector<InheritedFd> fds;
    for (size_t i = 0; i < tasks.size(); ++i) {
      const int as = 10 + static_cast<int>(i);
      extra.insert(extra.end(), {"--inherit-fd", InheritFdArgument(as, static_cast<uint32_t>(i))});
      fds.push_back({sink.File({StreamKind::kTask, static_cast<uint64_t>(tasks[i].value)}), as});
    }
    const auto restored = Restore(view, extra, fds);
    ASSERT_TRUE(restored) << restored.error().message();
  }

  CriuBinary criu_;
  std::string root_;
  std::string images_;
  std::string beat_path_;
  volatile uint64_t* beat_ = nullptr;
  Pid pid_;
  std::vector<Pid> tree_;
  Result<> served_;
  bool abort_soon_ = false;
};

TEST_F(CriuEndToEnd, StockCriuRestoresWhatOurPageServerWrote) {
  Start("8");
  const auto maps_before = ReadMaps(pid_).value();
  DivertingSink sink(images_, {});
  const auto dumped = Dump(sink);
  ASSERT_TRUE(dumped) << dumped.error().message();
  ASSERT_TRUE(served_) << served_.error().message();
  EXPECT_EQ(sink.closes, 1);
  EXPECT_EQ(sink.streams.size(), 1u);
  AwaitGone();
  const auto restored = Restore(images_);
  ASSERT_TRUE(restored) << restored.error().message();
  ExpectAliveAndRight();
  const auto maps_after = ReadMaps(pid_).value();
  EXPECT_EQ(maps_before.size(), maps_after.size());
}

// The first breakpoint in a second costs 10 ms and more.
TEST_F(CriuEndToEnd, NobodyIsStoppedByABreakpoint) {
  Start("2");
  DivertingSink sink(images_, {});
  ASSERT_TRUE(Dump(sink, {"-v4"}));
  AwaitGone();
  ASSERT_TRUE(Restore(images_, {"-v4"}));
  ExpectAliveAndRight();
  for (const char* const log : {"/dump.log", "/restore.log"}) {
    EXPECT_THAT(ReadFile(root_ + log).value(), ::testing::HasSubstr("Force no-breakpoints")) << log;
  }
}

TEST_F(CriuEndToEnd, OurPagemapHoldsTheSamePagesAsCriusOwn) {
  Start("8");
  DivertingSink sink(images_, {});
  ASSERT_TRUE(Dump(sink, {"-R"}));
  const std::string stock = root_ + "/stock";
  Require(MakeDirectory(stock));
  CriuCommand command;
  command.args = {"dump", "-R", "-t", std::to_string(pid_.value), "-D", stock};
  command.log_path = root_ + "/stock.log";
  const auto outcome = RunCriu(criu_, command);
  ASSERT_TRUE(outcome) << outcome.error().message();
  const PageStreamId id{StreamKind::kTask, static_cast<uint64_t>(pid_.value)};
  const Pagemap ours = ReadPagemap(images_, id).value();
  const Pagemap theirs = ReadPagemap(stock, id).value();
  EXPECT_EQ(ours.PresentBytes(), theirs.PresentBytes());
  EXPECT_EQ(ours.pages_id, theirs.pages_id);
  EXPECT_EQ(Stat(images_ + "/" + PagesName(1)).value().st_size,
            Stat(stock + "/" + PagesName(1)).value().st_size);
  ExpectAliveAndRight();
}

TEST_F(CriuEndToEnd, CriusOwnImagesRoundTripThroughOurMessages) {
  Start("8", "madvise");
  DivertingSink sink(images_, {});
  ASSERT_TRUE(Dump(sink, {"-R"}));
  const auto round_trip = [&]<class Message>(const std::string& name, ImageType type, size_t from) {
    const RawImage image = RawImage::Read(images_ + "/" + name, type).value();
    ASSERT_GT(image.messages().size(), from) << name;
    for (const RawImage::Message& raw : image.messages().subspan(from)) {
      const Message message = ParseMessage<Message>(image, raw).value();
      EXPECT_EQ(message.SerializeAsString().size(), raw.bytes.size()) << name;
      const Message again =
          ParseMessage<Message>(image, {raw.offset, std::string_view(message.SerializeAsString())})
              .value();
      EXPECT_EQ(again.SerializeAsString(), message.SerializeAsString());
    }
  };
  const std::string pid = std::to_string(pid_.value);
  round_trip.operator()<proto::MmEntry>("mm-" + pid + ".img", ImageType::kMm, 0);
  round_trip.operator()<proto::FileEntry>("files.img", ImageType::kFiles, 0);
  round_trip.operator()<proto::CoreEntry>("core-" + pid + ".img", ImageType::kCore, 0);
  round_trip.operator()<proto::PstreeEntry>("pstree.img", ImageType::kPstree, 0);
  round_trip.operator()<proto::InventoryEntry>("inventory.img", ImageType::kInventory, 0);
  // The one we rewrite keeps every byte where it was.
  const RawImage mm = RawImage::Read(images_ + "/mm-" + pid + ".img", ImageType::kMm).value();
  const auto entry = ParseMessage<proto::MmEntry>(mm, mm.messages()[0]).value();
  EXPECT_EQ(entry.SerializeAsString(), mm.messages()[0].bytes);
}

TEST_F(CriuEndToEnd, MemoryIsRightWhenMappedFromAPageImage) {
  Start("64");
  RoundTripDirect({pid_});
  ExpectAliveAndRight();
  uint64_t mapped = 0;
  for (const VmaInfo& vma : Value(ReadMaps(pid_))) {
    if (vma.name.find("layer-") != std::string::npos) mapped += vma.range.size().value;
  }
  EXPECT_EQ(mapped, 64 * kMiB);
}

TEST_F(CriuEndToEnd, ParentAndChildKeepTheirOwnMemoryWhenBothAreMapped) {
  Start("16", "tree");
  const std::vector<Pid> tree = ReadTree(pid_).value();
  ASSERT_EQ(tree.size(), 2u);
  RoundTripDirect(tree);
  ExpectAliveAndRight(0);
  ExpectAliveAndRight(3);
}

TEST_F(CriuEndToEnd, ThreadsRunOnWhenMapped) {
  Start("16", "threads");
  RoundTripDirect({pid_});
  ExpectAliveAndRight(0);
  ExpectAliveAndRight(3);
  EXPECT_EQ(ReadThreads(pid_).value().size(), 4u);
}

TEST_F(CriuEndToEnd, MadviseFlagsSurviveMapping) {
  Start("16", "madvise");
  const auto flags = [&] {
    for (const VmaInfo& vma : Value(ReadSmaps(pid_))) {
      if (vma.range.Contains(Vaddr(beat_[2]))) {
        std::vector<std::string> sorted = vma.vm_flags;
        std::ranges::sort(sorted);
        return sorted;
      }
    }
    return std::vector<std::string>();
  };
  std::vector<std::string> before = flags();
  RoundTripDirect({pid_});
  ExpectAliveAndRight();
  std::vector<std::string> after = flags();
  EXPECT_EQ(before, after);
}

TEST_F(CriuEndToEnd, GuardPagesSurviveMapping) {
  Start("16", "guard");
  const auto guarded = [&] {
    const Fd pidfd = Value(OpenFile(fmt::format("/proc/{}/pagemap", pid_.value), O_RDONLY));
    return HasGuardPages(pidfd.get(), Memory(pid_));
  };
  if (!guarded()) GTEST_SKIP() << "this kernel has no guard pages";
  RoundTripDirect({pid_});
  ExpectAliveAndRight();
  EXPECT_TRUE(guarded());
}

TEST_F(CriuEndToEnd, ReadTasksTellsNamesStatesAndThreads) {
  Start("4", "tree");
  DivertingSink sink(images_, {});
  const auto dumped = Dump(sink, {"-R"});
  ASSERT_TRUE(dumped) << dumped.error().message();
  const std::vector<Task> tasks = ReadTasks(images_).value();
  ASSERT_EQ(tasks.size(), 2u);
  EXPECT_EQ(tasks[0].vpid, static_cast<uint32_t>(pid_.value));
  EXPECT_EQ(tasks[0].parent, 0u);
  EXPECT_EQ(tasks[0].name, "criu_checker");
  EXPECT_EQ(tasks[0].state, TaskState::kAlive);
  EXPECT_EQ(tasks[1].parent, tasks[0].vpid);
  EXPECT_EQ(tasks[1].threads.size(), 1u);
  int takeable = 0;
  for (const Vma& vma : Value(ReadVmas(images_, tasks[0].vpid))) takeable += IsTakeable(vma);
  EXPECT_GE(takeable, 1);
}

TEST_F(CriuEndToEnd, ProgramRunsOnWhenTheSinkFailsAtClose) {
  Start("8");
  DivertingSink sink(images_, {});
  sink.fail_at_close = true;
  const auto dumped = Dump(sink);
  EXPECT_FALSE(dumped);
  ASSERT_FALSE(served_);
  EXPECT_EQ(served_.error().message(), "the disk is full");
  ExpectAliveAndRight();
}

TEST_F(CriuEndToEnd, ProgramRunsOnWhenTheSinkFailsInTheMiddle) {
  Start("64");
  DivertingSink sink(images_, {});
  sink.fail_at_pages = true;
  const auto dumped = Dump(sink);
  EXPECT_FALSE(dumped);
  ASSERT_FALSE(served_);
  EXPECT_EQ(served_.error().message(), "the disk is full");
  EXPECT_EQ(sink.closes, 0);
  ExpectAliveAndRight();
}

TEST_F(CriuEndToEnd, AbortLeavesTheProgramRunning) {
  Start("8");
  DivertingSink sink(images_, {});
  abort_soon_ = true;
  const auto dumped = Dump(sink);
  EXPECT_FALSE(dumped);
  ASSERT_FALSE(served_);
  EXPECT_EQ(served_.error().message(), "interrupted");
  ExpectAliveAndRight();
}

TEST_F(CriuEndToEnd, FailedRestoreNamesCriusOwnReason) {
  Start("4");
  DivertingSink sink(images_, {});
  ASSERT_TRUE(Dump(sink));
  AwaitGone();
  pid_ = Pid{0};
  tree_.clear();
  Require(RemoveFile(images_ + "/" + PagesName(1)));
  const auto restored = Restore(images_);
  ASSERT_FALSE(restored);
  EXPECT_THAT(restored.error().message(), HasSubstr("Error (criu/"));
  EXPECT_THAT(restored.error().message(), HasSubstr("restore.log"));
}

}  // namespace
}  // namespace unmoor::criu
