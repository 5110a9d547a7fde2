// Connected stream sockets between us and a child.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

struct StreamPair {
  Fd ours;
  Fd theirs;
  // Both ends close-on-exec, with buffers of about `buffer` bytes as far as the system allows.
  [[nodiscard]] static Result<StreamPair> Create(Bytes buffer = Bytes(4 << 20));
};

// All of it; a peer that is gone is an error (EPIPE), never a signal.
[[nodiscard]] Result<> SendAll(int fd, std::span<const std::byte> data, const std::string& name);
// What has come by now, at most `data.size()` bytes, waiting only while there is nothing; 0 at the
// end of the stream. After bytes have come it looks again a few times, with naps, before it sleeps
// until it is woken: waking a reader for each small message costs the sender more than sending it.
[[nodiscard]] Result<size_t> ReceiveSome(int fd, std::span<std::byte> data,
                                         const std::string& name);
// No more will be sent from this side: the peer reads what is on its way, then end of stream.
void ShutdownWrite(int fd);
// Reads and throws away until end of stream or error.
void DiscardStream(int fd, std::span<std::byte> scratch);

// One message over a SOCK_SEQPACKET or SOCK_DGRAM socket, with a descriptor (-1: none) beside it.
[[nodiscard]] Result<> SendMessage(int fd, std::span<const std::byte> data, int passed_fd,
                                   const std::string& name);
// With at most 16 descriptors.
[[nodiscard]] Result<> SendMessage(int fd, std::span<const std::byte> data,
                                   std::span<const int> passed_fds, const std::string& name);
// The same without waiting: false when the peer must read first.
[[nodiscard]] Result<bool> TrySendMessage(int fd, std::span<const std::byte> data,
                                          const std::string& name);
struct ReceivedMessage {
  size_t size = 0;  // 0: the peer is gone
  Fd passed;
};
[[nodiscard]] Result<ReceivedMessage> ReceiveMessage(int fd, std::span<std::byte> data,
                                                     const std::string& name);
// A listening stream socket named `name` in the directory `directory`, and the next connection to
// one.
[[nodiscard]] Result<Fd> ListenInDirectory(const std::string& directory, const std::string& name);
[[nodiscard]] Result<Fd> AcceptConnection(int listener);
// Both sides read the end of the stream, whoever else holds a copy of this descriptor.
void ShutDown(int fd);
// Both ends close-on-exec, of type SOCK_SEQPACKET.
[[nodiscard]] Result<StreamPair> CreateMessagePair();

}  // namespace unmoor
