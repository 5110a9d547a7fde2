// Locks of files and directories (flock), and who holds them.
//
// The kernel drops such a lock when the last descriptor of the open file is closed. Thread-safe.
#pragma once

#include <string>

#include "base/result.h"

namespace unmoor {

// An exclusive lock without waiting; false when somebody else holds one.
[[nodiscard]] Result<bool> TryLock(int fd, const std::string& name);
// A shared lock without waiting; false when somebody holds it exclusively.
[[nodiscard]] Result<bool> TryLockShared(int fd, const std::string& name);
// Gives up the lock of the open file, for every descriptor of it.
void Unlock(int fd);
// Who holds a lock on the file behind `fd`: "unmoor (process 4711)", as /proc/locks tells; empty
// when it cannot be told.
[[nodiscard]] std::string LockHolder(int fd);

}  // namespace unmoor
