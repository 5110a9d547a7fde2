// Files and directories on a real file system.
#include "os/file.h"
#include "os/file_lock.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>

namespace unmoor {
namespace {

class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = MakeTemporaryDirectory(::testing::TempDir(), "file-test-").value();
  }
  void TearDown() override { EXPECT_TRUE(RemoveTree(dir_)); }
  [[nodiscard]] std::string Path(const std::string& name) const { return dir_ + "/" + name; }
  std::string dir_;
};

TEST_F(FileTest, WhatIsWrittenIsRead) {
  for (const size_t size : {0u, 1u, 4095u, 4096u, 4097u, 100'000u}) {
    const std::string data(size, 'x');
    ASSERT_TRUE(WriteFile(Path("a"), data));
    EXPECT_EQ(ReadFile(Path("a")).value(), data);
  }
}

TEST_F(FileTest, ReadFileHasALimit) {
  ASSERT_TRUE(WriteFile(Path("a"), std::string(5000, 'x')));
  EXPECT_TRUE(ReadFile(Path("a"), Bytes(5000)));
  const auto text = ReadFile(Path("a"), Bytes(4999));
  ASSERT_FALSE(text);
  EXPECT_EQ(text.error().kind(), ErrorKind::kUser);
}

TEST_F(FileTest, ErrorsNameFileAndErrno) {
  const auto fd = OpenFile(Path("none"), O_RDONLY);
  ASSERT_FALSE(fd);
  EXPECT_EQ(fd.error().errnum(), ENOENT);
  EXPECT_NE(fd.error().message().find(Path("none")), std::string::npos);
}

TEST_F(FileTest, ShortReadAtSaysWhere) {
  ASSERT_TRUE(WriteFile(Path("a"), "12345"));
  const Fd fd = OpenFile(Path("a"), O_RDONLY).value();
  std::byte buffer[8];
  const auto read = ReadExactlyAt(fd.get(), buffer, FileOffset(1), "a");
  ASSERT_FALSE(read);
  EXPECT_EQ(read.error().message(), "a ends at offset 5, 4 bytes more were expected");
}

TEST_F(FileTest, DescriptorsAreCloseOnExec) {
  ASSERT_TRUE(WriteFile(Path("a"), ""));
  const Fd fd = OpenFile(Path("a"), O_RDONLY).value();
  EXPECT_NE(::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC, 0);
}

TEST_F(FileTest, RemoveTreeDoesNotFollowLinks) {
  ASSERT_TRUE(MakeDirectory(Path("keep")));
  ASSERT_TRUE(WriteFile(Path("keep/file"), "x"));
  ASSERT_TRUE(MakeDirectory(Path("gone")));
  ASSERT_TRUE(MakeDirectory(Path("gone/inner")));
  ASSERT_TRUE(WriteFile(Path("gone/inner/file"), "x"));
  ASSERT_TRUE(SymbolicLink("../keep", Path("gone/link")));
  ASSERT_TRUE(RemoveTree(Path("gone")));
  EXPECT_FALSE(Exists(Path("gone")));
  EXPECT_TRUE(Exists(Path("keep/file")));
  EXPECT_TRUE(RemoveTree(Path("gone")));
}

TEST_F(FileTest, CopyKeepsHoles) {
  {
    const Fd fd = OpenFile(Path("a"), O_RDWR | O_CREAT).value();
    ASSERT_TRUE(Truncate(fd.get(), Bytes(uint64_t{1} << 30), "a"));
    const std::byte byte{7};
    ASSERT_TRUE(WriteExactlyAt(fd.get(), std::span(&byte, 1), FileOffset(500'000'000), "a"));
  }
  ASSERT_TRUE(CopyFile(Path("a"), Path("b")));
  const struct stat info = Stat(Path("b")).value();
  EXPECT_EQ(info.st_size, off_t{1} << 30);
  EXPECT_LE(info.st_blocks * 512, 1 << 20);
  const Fd fd = OpenFile(Path("b"), O_RDONLY).value();
  std::byte byte{};
  ASSERT_TRUE(ReadExactlyAt(fd.get(), std::span(&byte, 1), FileOffset(500'000'000), "b"));
  EXPECT_EQ(byte, std::byte{7});
  const auto ranges =
      DataRanges(fd.get(), {FileOffset(0), FileOffset(uint64_t{1} << 30)}, "b").value();
  ASSERT_EQ(ranges.size(), 1u);
  EXPECT_TRUE(ranges[0].Contains(FileOffset(500'000'000)));
}

TEST_F(FileTest, ExchangeSwapsDirectories) {
  ASSERT_TRUE(MakeDirectory(Path("a")));
  ASSERT_TRUE(MakeDirectory(Path("b")));
  ASSERT_TRUE(WriteFile(Path("a/was_a"), ""));
  ASSERT_TRUE(RenameExchange(Path("a"), Path("b")));
  EXPECT_TRUE(Exists(Path("b/was_a")));
  EXPECT_TRUE(Exists(Path("a")));
}

TEST_F(FileTest, LockIsExclusiveAndGoesWithItsDescriptor) {
  Fd first = OpenFile(dir_, O_RDONLY | O_DIRECTORY).value();
  EXPECT_TRUE(TryLock(first.get(), dir_).value());
  {
    const Fd second = OpenFile(dir_, O_RDONLY | O_DIRECTORY).value();
    EXPECT_FALSE(TryLock(second.get(), dir_).value());
  }
  const Fd third = OpenFile(dir_, O_RDONLY | O_DIRECTORY).value();
  first.Reset();
  EXPECT_TRUE(TryLock(third.get(), dir_).value());
}

TEST_F(FileTest, StreamsEndEarlyWithoutError) {
  int pipe[2];
  ASSERT_EQ(::pipe(pipe), 0);
  const Fd in(pipe[0]);
  Fd out(pipe[1]);
  ASSERT_TRUE(WriteStream(out.get(), std::as_bytes(std::span("abc", 3)), "pipe"));
  out.Reset();
  std::byte buffer[8];
  EXPECT_EQ(ReadStream(in.get(), buffer, "pipe").value(), 3u);
}

}  // namespace
}  // namespace unmoor
