#include "criu/page_server.h"

#include <gmock/gmock.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "os/socket.h"

namespace unmoor::criu {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint64_t kTask7 = 7 << 8 | 1;
constexpr uint64_t kShared9 = 9 << 8 | 2;

class RecordingSink : public PageSink {
 public:
  Result<> Open(PageStreamId id) override {
    events.push_back("open " + ToString(id));
    return fail == "open" ? MachineError("no open") : Result<>();
  }
  Result<> Pages(PageStreamId id, Vaddr at, uint32_t flags,
                 std::span<const std::byte> data) override {
    events.push_back(fmt::format("{} pages at {} of {} flags {}", data.size() / kPageSize, at,
                                 ToString(id), flags));
    bytes.insert(bytes.end(), data.begin(), data.end());
    return fail == "pages" ? MachineError("no pages") : Result<>();
  }
  Result<std::span<std::byte>> Room(PageStreamId /*id*/, Vaddr /*at*/, Bytes want) override {
    room.resize(std::min<uint64_t>(want.value, room_pages * kPageSize));
    return std::span(room);
  }
  Result<> Filled(PageStreamId id, Vaddr at, Bytes size) override {
    events.push_back(
        fmt::format("{} filled at {} of {}", size.value / kPageSize, at, ToString(id)));
    bytes.insert(bytes.end(), room.begin(), room.end());
    return fail == "pages" ? MachineError("no pages") : Result<>();
  }
  Result<> Absent(PageStreamId id, VaddrRange range, uint32_t flags) override {
    events.push_back(fmt::format("absent {} of {} flags {}", range, ToString(id), flags));
    return {};
  }
  Result<> Close() override {
    events.emplace_back("close");
    return fail == "close" ? MachineError("no close") : Result<>();
  }
  std::vector<std::string> events;
  std::vector<std::byte> bytes;
  std::vector<std::byte> room;
  uint64_t room_pages = 0;
  std::string fail;
};

class PageServerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    StreamPair pair = StreamPair::Create().value();
    peer_ = std::move(pair.theirs);
    server_ = std::make_unique<PageServer>(std::move(pair.ours), sink_);
    thread_ = std::thread([this] { result_ = server_->Run(); });
  }
  void TearDown() override { Finish(); }
  // Hangs up and waits for Run.
  const Result<>& Finish() {
    peer_.Reset();
    if (thread_.joinable()) thread_.join();
    return result_;
  }
  void Send(const void* data, size_t size) {
    (void)SendAll(peer_.get(), {static_cast<const std::byte*>(data), size}, "server");
  }
  void New(uint32_t command, uint64_t pages, uint64_t address, uint64_t stream) {
    uint64_t words[4] = {command | uint64_t{0xdeadbeef} << 32, pages, address, stream};
    Send(words, sizeof words);
  }
  void Old(uint32_t command, uint32_t pages, uint64_t address, uint64_t stream) {
    uint64_t words[3] = {command | uint64_t{pages} << 32, address, stream};
    Send(words, sizeof words);
  }
  void SendPages(size_t pages, int value) {
    const std::vector<std::byte> data(pages * kPageSize, std::byte(value));
    Send(data.data(), data.size());
  }
  // Bytes answered, at most `size`; 0 at end of stream.
  ssize_t Answer(void* data, size_t size) { return ::recv(peer_.get(), data, size, MSG_WAITALL); }
  int32_t IntAnswer() {
    int32_t value = -99;
    EXPECT_EQ(Answer(&value, sizeof value), 4);
    return value;
  }
  uint8_t ByteAnswer() {
    uint8_t value = 99;
    EXPECT_EQ(Answer(&value, 1), 1);
    return value;
  }

  RecordingSink sink_;
  Fd peer_;
  std::unique_ptr<PageServer> server_;
  std::thread thread_;
  Result<> result_;
};

TEST_F(PageServerTest, SpeaksTheNewHeader) {
  New(4, 0, 0, kTask7);
  EXPECT_EQ(ByteAnswer(), 0);
  New(6 | 4u << 16, 2, 0x10000, kTask7);
  SendPages(2, 5);
  New(6 | 6u << 16, 1, 0x20000, kTask7);
  SendPages(1, 6);
  New(2, 3, 0x30000, kTask7);
  New(4, 0, 0, kShared9);
  EXPECT_EQ(ByteAnswer(), 0);
  New(1, 1, 0, kShared9);
  SendPages(1, 7);
  New(0x1024, 0, 0, 0);
  EXPECT_EQ(IntAnswer(), 0);
  ASSERT_TRUE(Finish()) << result_.error().message();
  EXPECT_THAT(
      sink_.events,
      ElementsAre("open task 7", "2 pages at 0x10000 of task 7 flags 4",
                  "1 pages at 0x20000 of task 7 flags 6", "absent 30000-33000 of task 7 flags 1",
                  "open shared memory 9", "1 pages at 0x0 of shared memory 9 flags 4", "close"));
  EXPECT_EQ(sink_.bytes[3 * kPageSize], std::byte(7));
  EXPECT_EQ(server_->received(), Bytes(4 * kPageSize));
}

TEST_F(PageServerTest, SpeaksTheOldHeader) {
  Old(5, 0, 0, kTask7);
  EXPECT_EQ(IntAnswer(), 0);
  Old(3, 0, 0, kTask7);
  Old(1, 1, 0x10000, kTask7);
  SendPages(1, 1);
  Old(0x1023, 0, 0, 0);
  EXPECT_EQ(IntAnswer(), 0);
  ASSERT_TRUE(Finish());
  EXPECT_THAT(sink_.events,
              ElementsAre("open task 7", "1 pages at 0x10000 of task 7 flags 4", "close"));
}

TEST_F(PageServerTest, LongRunsComeInChunks) {
  New(4, 0, 0, kTask7);
  EXPECT_EQ(ByteAnswer(), 0);
  New(6 | 4u << 16, 600, 0x100000, kTask7);
  SendPages(600, 1);
  New(0x1024, 0, 0, 0);
  EXPECT_EQ(IntAnswer(), 0);
  ASSERT_TRUE(Finish());
  EXPECT_THAT(sink_.events, ElementsAre("open task 7", "256 pages at 0x100000 of task 7 flags 4",
                                        "256 pages at 0x200000 of task 7 flags 4",
                                        "88 pages at 0x300000 of task 7 flags 4", "close"));
}

TEST_F(PageServerTest, ClosingMessageAsTheFirstIsAnswered) {
  New(0x1024, 0, 0, 0);
  EXPECT_EQ(IntAnswer(), 0);
  EXPECT_TRUE(Finish());
}

TEST_F(PageServerTest, FailedCloseVetoesTheDump) {
  sink_.fail = "close";
  New(4, 0, 0, kTask7);
  EXPECT_EQ(ByteAnswer(), 0);
  New(0x1024, 0, 0, 0);
  int32_t answer = 0;
  EXPECT_EQ(Answer(&answer, sizeof answer), 0) << "criu must not get its answer";
  ASSERT_FALSE(Finish());
  EXPECT_EQ(result_.error().message(), "no close");
}

TEST_F(PageServerTest, FailedSinkIsDrainedNotHungUpOn) {
  sink_.fail = "pages";
  New(4, 0, 0, kTask7);
  EXPECT_EQ(ByteAnswer(), 0);
  New(6 | 4u << 16, 4096, 0x100000, kTask7);
  SendPages(4096, 1);  // would block for ever, or break, were nobody reading
  New(0x1024, 0, 0, 0);
  int32_t answer = 0;
  EXPECT_EQ(Answer(&answer, sizeof answer), 0);
  ASSERT_FALSE(Finish());
  EXPECT_EQ(result_.error().message(), "no pages");
  EXPECT_EQ(sink_.events.size(), 2u) << "no call after an error";
}

TEST_F(PageServerTest, AbortEndsTheStreamAndSaysWhy) {
  New(4, 0, 0, kTask7);
  EXPECT_EQ(ByteAnswer(), 0);
  server_->Abort("interrupted by the user");
  New(6 | 4u << 16, 1, 0x100000, kTask7);
  SendPages(1, 1);
  New(0x1024, 0, 0, 0);
  int32_t answer = 0;
  EXPECT_EQ(Answer(&answer, sizeof answer), 0);
  ASSERT_FALSE(Finish());
  EXPECT_EQ(result_.error().message(), "interrupted by the user");
}

TEST_F(PageServerTest, AbortAfterTheAnswerChangesNothing) {
  New(0x1024, 0, 0, 0);
  EXPECT_EQ(IntAnswer(), 0);
  server_->Abort("too late");
  EXPECT_TRUE(Finish());
}

TEST_F(PageServerTest, EndInTheMiddleOfAMessageNamesWhatWasExpected) {
  New(4, 0, 0, kTask7);
  EXPECT_EQ(ByteAnswer(), 0);
  New(6 | 4u << 16, 2, 0x10000, kTask7);
  SendPages(1, 1);
  ASSERT_FALSE(Finish());
  EXPECT_THAT(result_.error().message(),
              HasSubstr("4096 of 8192 bytes of the pages at 0x10000 of task 7"));
}

TEST_F(PageServerTest, EndWithoutAClosingMessageIsAnError) {
  New(4, 0, 0, kTask7);
  EXPECT_EQ(ByteAnswer(), 0);
  ASSERT_FALSE(Finish());
  EXPECT_THAT(result_.error().message(), HasSubstr("0 of 24 bytes of the header"));
}

TEST_F(PageServerTest, NonsenseIsRefused) {
  New(4, 0, 0, kTask7);
  EXPECT_EQ(ByteAnswer(), 0);
  New(6 | 4u << 16, uint64_t{1} << 60, 0x10000, kTask7);
  ASSERT_FALSE(Finish());
  EXPECT_THAT(result_.error().message(), HasSubstr("no range of memory"));
}

TEST_F(PageServerTest, LongRunsAreReceivedWhereTheSinkHasRoom) {
  sink_.room_pages = 50;
  New(4, 0, 0, kTask7);
  EXPECT_EQ(ByteAnswer(), 0);
  New(6 | 4u << 16, 1, 0x10000, kTask7);
  SendPages(1, 1);
  New(6 | 4u << 16, 120, 0x100000, kTask7);
  SendPages(60, 2);
  SendPages(60, 3);
  New(6 | 4u << 16, 2, 0x900000, kTask7);
  SendPages(2, 4);
  New(0x1024, 0, 0, 0);
  EXPECT_EQ(IntAnswer(), 0);
  ASSERT_TRUE(Finish()) << result_.error().message();
  EXPECT_THAT(sink_.events,
              ElementsAre("open task 7", "1 pages at 0x10000 of task 7 flags 4",
                          "50 filled at 0x100000 of task 7", "50 filled at 0x132000 of task 7",
                          "20 pages at 0x164000 of task 7 flags 4",
                          "2 pages at 0x900000 of task 7 flags 4", "close"));
  for (const auto& [page, value] :
       {std::pair(0, 1), {1, 2}, {60, 2}, {61, 3}, {120, 3}, {121, 4}}) {
    EXPECT_EQ(sink_.bytes[static_cast<size_t>(page) * kPageSize + 4095], std::byte(value));
  }
  EXPECT_EQ(server_->received(), Bytes(123 * kPageSize));
}

TEST_F(PageServerTest, LazyPagesAreRefused) {
  New(7, 1, 0, kTask7);
  ASSERT_FALSE(Finish());
  EXPECT_THAT(result_.error().message(), HasSubstr("--lazy-pages"));
}

TEST_F(PageServerTest, UnknownCommandsAndStreamsAreRefused) {
  New(99, 1, 0, kTask7);
  ASSERT_FALSE(Finish());
  EXPECT_THAT(result_.error().message(), HasSubstr("unknown command 0x63"));
}

}  // namespace
}  // namespace unmoor::criu
