// See file_lock.h.
#include "os/file_lock.h"

#include <sys/file.h>
#include <sys/stat.h>

#include <cerrno>
#include <sstream>

#include "os/file.h"
#include "os/file_hook.h"

namespace unmoor {

namespace {

Result<bool> TryLockAs(int kind, int fd, const std::string& name) {
  if (const int failure = BeforeFileCall("flock", fd, name); failure != 0) {
    return SystemError(failure, "cannot lock " + name);
  }
  if (::flock(fd, kind | LOCK_NB) == 0) return true;
  if (errno == EWOULDBLOCK) return false;
  return SystemError(errno, "cannot lock " + name);
}

}  // namespace

Result<bool> TryLock(int fd, const std::string& name) {
  return TryLockAs(LOCK_EX, fd, name);
}

Result<bool> TryLockShared(int fd, const std::string& name) {
  return TryLockAs(LOCK_SH, fd, name);
}

void Unlock(int fd) {
  (void)::flock(fd, LOCK_UN);
}

// Lines like "1: FLOCK  ADVISORY  WRITE 4711 fd:01:1234 0 EOF". The device's form differs between
// file systems, so the inode decides.
std::string LockHolder(int fd) {
  struct stat info{};
  if (::fstat(fd, &info) != 0) return {};
  std::istringstream lines(ReadFile("/proc/locks").value_or(""));
  const std::string inode = fmt::format(":{}", info.st_ino);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string number, kind, mode, access, pid, file;
    words >> number >> kind >> mode >> access >> pid >> file;
    if (kind != "FLOCK" || !file.ends_with(inode)) continue;
    std::string name = ReadFile(fmt::format("/proc/{}/comm", pid)).value_or("");
    while (name.ends_with('\n')) name.pop_back();
    if (!name.empty()) return fmt::format("{} (process {})", name, pid);
  }
  return {};
}

}  // namespace unmoor
