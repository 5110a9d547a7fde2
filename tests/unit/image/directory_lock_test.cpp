// DirectoryLock and Publisher: a directory that is read is not replaced, and the other way round.
#include "image/directory_lock.h"

#include <fcntl.h>

#include "image/publisher.h"
#include "image_fixture.h"
#include "os/file_lock.h"

namespace unmoor {
namespace {

void Fill(const std::string& directory) {
  ASSERT_OK(WriteFile(ManifestPath(directory), "{\"format\": \"unmoor checkpoint\"}"));
}

std::string Image(const TemporaryDirectory& parent) {
  const std::string image = parent.path() + "/image";
  EXPECT_TRUE(MakeDirectory(image));
  Fill(image);
  return image;
}

TEST(DirectoryLock, ReadersShareAndAWriterIsAlone) {
  const TemporaryDirectory parent;
  const std::string image = Image(parent);
  {
    const auto first = DirectoryLock::Take(image, LockUse::kRead);
    const auto second = DirectoryLock::Take(image, LockUse::kRead);
    ASSERT_OK(first);
    ASSERT_OK(second);
    const auto writer = DirectoryLock::Take(image, LockUse::kWrite);
    ASSERT_FALSE(writer);
    EXPECT_EQ(writer.error().kind(), ErrorKind::kUser);
    EXPECT_NE(writer.error().message().find(fmt::format("process {}", ::getpid())),
              std::string::npos)
        << writer.error().message();
  }
  const auto writer = DirectoryLock::Take(image, LockUse::kWrite);
  ASSERT_OK(writer);
  EXPECT_FALSE(DirectoryLock::Take(image, LockUse::kRead));
}

TEST(DirectoryLock, NothingToLockIsNoError) {
  const TemporaryDirectory parent;
  const auto lock = DirectoryLock::Take(parent.path() + "/absent", LockUse::kRead);
  ASSERT_OK(lock);
  EXPECT_FALSE(lock->held());
}

// A descriptor that a child inherited must not keep the lock.
TEST(DirectoryLock, ReleaseIsForInheritedDescriptorsToo) {
  const TemporaryDirectory parent;
  const std::string image = Image(parent);
  auto lock = DirectoryLock::Take(image, LockUse::kRead);
  ASSERT_OK(lock);
  const pid_t child = ::fork();
  if (child == 0) {
    ::pause();
    ::_exit(0);
  }
  lock->Release();
  EXPECT_TRUE(DirectoryLock::Take(image, LockUse::kWrite));
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

TEST(DirectoryLock, ADirectoryThatIsReadIsNotReplaced) {
  const TemporaryDirectory parent;
  const std::string image = Image(parent);
  auto reader = DirectoryLock::Take(image, LockUse::kRead);
  ASSERT_OK(reader);
  EXPECT_FALSE(Publisher::Begin(image));
  reader->Release();
  ASSERT_OK(Publisher::Begin(image));
}

TEST(DirectoryLock, ADirectoryThatIsBeingReplacedIsNotRead) {
  const TemporaryDirectory parent;
  const std::string image = Image(parent);
  auto publisher = Publisher::Begin(image);
  ASSERT_OK(publisher);
  EXPECT_FALSE(DirectoryLock::Take(image, LockUse::kRead));
  Fill(publisher->path());
  ASSERT_OK(publisher->Publish());
  EXPECT_TRUE(DirectoryLock::Take(image, LockUse::kRead));
}

// One that appeared after Begin is locked before it is exchanged.
TEST(DirectoryLock, ADirectoryThatAppearedMeanwhileIsLockedToo) {
  const TemporaryDirectory parent;
  auto publisher = Publisher::Begin(parent.path() + "/image");
  ASSERT_OK(publisher);
  Fill(publisher->path());
  const std::string image = Image(parent);
  const auto reader = DirectoryLock::Take(image, LockUse::kRead);
  ASSERT_OK(reader);
  EXPECT_FALSE(publisher->Publish());
}

}  // namespace
}  // namespace unmoor
