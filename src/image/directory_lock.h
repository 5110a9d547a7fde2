// DirectoryLock: two commands don't work on one image directory at once.
//
// An flock on the directory itself: shared for those that read it, exclusive for those that
// replace, mend or remove it. The kernel drops it when the holder ends, however it ends, so there
// is nothing to clean up. A directory may be exchanged for another while its lock is waited for;
// the lock taken is always that of the one the name stands for then.
#pragma once

#include <string>

#include "base/result.h"
#include "os/fd.h"

namespace unmoor {

enum class LockUse { kRead, kWrite };

class DirectoryLock {
 public:
  // Waits half a second for a holder that is about to end, then says who it is. Where `dir` does
  // not exist or is no directory there is nothing to lock: the next to open it says so.
  [[nodiscard]] static Result<DirectoryLock> Take(const std::string& dir, LockUse use);

  DirectoryLock() = default;
  DirectoryLock(DirectoryLock&&) noexcept = default;
  DirectoryLock& operator=(DirectoryLock&& other) noexcept;
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;
  ~DirectoryLock() { Release(); }

  [[nodiscard]] bool held() const { return fd_.valid(); }
  // Also for processes forked meanwhile, which have the descriptor too.
  void Release();

 private:
  explicit DirectoryLock(Fd fd) : fd_(std::move(fd)) {}
  Fd fd_;
};

}  // namespace unmoor
