// See directory_lock.h.
#include "image/directory_lock.h"

#include <fcntl.h>

#include <cerrno>
#include <utility>

#include "os/file.h"
#include "os/file_lock.h"
#include "os/process_control.h"

namespace unmoor {
namespace {

constexpr int kTries = 50;
constexpr Nanos kPause(10'000'000);

// Whether `dir` still stands for what `fd` opened.
bool IsStill(const std::string& dir, const Fd& fd) {
  const auto named = Stat(dir);
  const auto opened = StatFd(fd.get(), dir);
  return named && opened && named->st_ino == opened->st_ino && named->st_dev == opened->st_dev;
}

}  // namespace

DirectoryLock& DirectoryLock::operator=(DirectoryLock&& other) noexcept {
  if (this != &other) {
    Release();
    fd_ = std::move(other.fd_);
  }
  return *this;
}

void DirectoryLock::Release() {
  if (!fd_.valid()) return;
  Unlock(fd_.get());
  fd_.Reset();
}

Result<DirectoryLock> DirectoryLock::Take(const std::string& dir, LockUse use) {
  std::string holder;
  for (int i = 0; i < kTries; ++i) {
    if (i > 0) SleepFor(kPause);
    auto fd = OpenFile(dir, O_RDONLY | O_DIRECTORY);
    if (!fd && (fd.error().errnum() == ENOENT || fd.error().errnum() == ENOTDIR)) {
      return DirectoryLock();
    }
    if (!fd) return Failure(std::move(fd).error());
    UNMOOR_ASSIGN(const bool locked,
                  use == LockUse::kRead ? TryLockShared(fd->get(), dir) : TryLock(fd->get(), dir));
    if (locked && IsStill(dir, *fd)) return DirectoryLock(std::move(*fd));
    if (!locked) holder = LockHolder(fd->get());
  }
  return UserError("{} is in use by {}; try again once that has ended", dir,
                   holder.empty() ? "another command" : holder);
}

}  // namespace unmoor
