// See socket.h.
#include "os/socket.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "os/file.h"

namespace unmoor {

Result<StreamPair> StreamPair::Create(Bytes buffer) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    return SystemError(errno, "cannot make a socket pair");
  }
  StreamPair pair{Fd(ends[0]), Fd(ends[1])};
  const int size = static_cast<int>(buffer.value);
  for (const int fd : ends) {
    // Only for speed. The first needs CAP_NET_ADMIN, the second is bounded by wmem_max.
    if (::setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) != 0) {
      (void)::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    }
  }
  return pair;
}

Result<> SendAll(int fd, std::span<const std::byte> data, const std::string& name) {
  while (!data.empty()) {
    const ssize_t n = ::send(fd, data.data(), data.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return SystemError(errno, fmt::format("cannot write to {}", name));
    data = data.subspan(static_cast<size_t>(n));
  }
  return {};
}

Result<size_t> ReceiveSome(int fd, std::span<std::byte> data, const std::string& name) {
  constexpr int kNaps = 20;
  constexpr timespec kNap{0, 30'000};
  for (int looks = 0;; ++looks) {
    const ssize_t n = ::recv(fd, data.data(), data.size(), looks < kNaps ? MSG_DONTWAIT : 0);
    if (n >= 0) return static_cast<size_t>(n);
    if (errno == EAGAIN) (void)::clock_nanosleep(CLOCK_MONOTONIC, 0, &kNap, nullptr);
    if (errno != EAGAIN && errno != EINTR) {
      return SystemError(errno, fmt::format("cannot read {}", name));
    }
  }
}

void ShutdownWrite(int fd) {
  (void)::shutdown(fd, SHUT_WR);
}

void DiscardStream(int fd, std::span<std::byte> scratch) {
  for (;;) {
    const ssize_t n = ::read(fd, scratch.data(), scratch.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
  }
}

Result<> SendMessage(int fd, std::span<const std::byte> data, int passed_fd,
                     const std::string& name) {
  return SendMessage(fd, data, std::span(&passed_fd, passed_fd >= 0 ? 1 : 0), name);
}

Result<> SendMessage(int fd, std::span<const std::byte> data, std::span<const int> passed_fds,
                     const std::string& name) {
  constexpr size_t kMaxPassed = 16;
  UNMOOR_CHECK(passed_fds.size() <= kMaxPassed);
  iovec iov{const_cast<std::byte*>(data.data()), data.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMaxPassed * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  if (!passed_fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(passed_fds.size_bytes());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(passed_fds.size_bytes());
    std::memcpy(CMSG_DATA(header), passed_fds.data(), passed_fds.size_bytes());
  }
  ssize_t n = 0;
  do {
    n = ::sendmsg(fd, &message, MSG_NOSIGNAL);
  } while (n < 0 && errno == EINTR);
  if (n != static_cast<ssize_t>(data.size())) {
    return SystemError(n < 0 ? errno : EIO, fmt::format("cannot send to {}", name));
  }
  return {};
}

Result<bool> TrySendMessage(int fd, std::span<const std::byte> data, const std::string& name) {
  ssize_t n = 0;
  do {
    n = ::send(fd, data.data(), data.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (n < 0 && errno == EINTR);
  if (n < 0 && errno == EAGAIN) return false;
  if (n != static_cast<ssize_t>(data.size())) {
    return SystemError(n < 0 ? errno : EIO, fmt::format("cannot send to {}", name));
  }
  return true;
}

Result<ReceivedMessage> ReceiveMessage(int fd, std::span<std::byte> data, const std::string& name) {
  iovec iov{data.data(), data.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t n = 0;
  do {
    n = ::recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return SystemError(errno, fmt::format("cannot receive from {}", name));
  ReceivedMessage received;
  received.size = static_cast<size_t>(n);
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (header != nullptr && header->cmsg_type == SCM_RIGHTS) {
    int passed = -1;
    std::memcpy(&passed, CMSG_DATA(header), sizeof(int));
    received.passed = Fd(passed);
  }
  return received;
}

Result<Fd> ListenInDirectory(const std::string& directory, const std::string& name) {
  UNMOOR_ASSIGN(const Fd parent, OpenFile(directory, O_PATH | O_DIRECTORY));
  Fd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  // A path of any length by way of its descriptor: an address has room for 107 bytes.
  const std::string path = fmt::format("/proc/self/fd/{}/{}", parent.get(), name);
  UNMOOR_CHECK(path.size() < sizeof(address.sun_path));
  path.copy(address.sun_path, path.size());
  // SAFETY: as bind(2) wants it.
  if (!listener.valid() ||
      ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 ||
      ::listen(listener.get(), 1) != 0) {
    return SystemError(errno, fmt::format("cannot listen at {}/{}", directory, name));
  }
  return listener;
}

Result<Fd> AcceptConnection(int listener) {
  Fd connection(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  if (!connection.valid()) return SystemError(errno, "cannot accept a connection");
  return connection;
}

void ShutDown(int fd) {
  (void)::shutdown(fd, SHUT_RDWR);
}

Result<StreamPair> CreateMessagePair() {
  std::array<int, 2> fds{};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds.data()) != 0) {
    return SystemError(errno, "cannot create a socket pair");
  }
  return StreamPair{Fd(fds[0]), Fd(fds[1])};
}

}  // namespace unmoor
