// See pipe.h.
#include "os/pipe.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <ctime>

#include "os/file.h"

namespace unmoor {

Result<Pipe> Pipe::Create() {
  int ends[2] = {-1, -1};
  if (::pipe2(ends, O_CLOEXEC) != 0) return SystemError(errno, "cannot make a pipe");
  return Pipe{Fd(ends[0]), Fd(ends[1])};
}

Result<> WritePipe(int fd, std::span<const std::byte> data, const std::string& name) {
  sigset_t broken;
  sigset_t before;
  sigset_t pending;
  ::sigemptyset(&broken);
  ::sigaddset(&broken, SIGPIPE);
  ::sigpending(&pending);
  ::pthread_sigmask(SIG_BLOCK, &broken, &before);
  const auto written = WriteStream(fd, data, name);
  if (!written && written.error().errnum() == EPIPE && ::sigismember(&pending, SIGPIPE) == 0) {
    const timespec now{};
    (void)::sigtimedwait(&broken, nullptr, &now);
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return written;
}

bool PipeHasEnded(int fd) {
  pollfd item{fd, POLLIN, 0};
  return ::poll(&item, 1, 0) > 0 && (item.revents & POLLIN) == 0;
}

}  // namespace unmoor
