// WriteRing: buffers on their way to a file by io_uring, so that filling the next does not wait for
// writing the last.
//
//   UNMOOR_ASSIGN(WriteRing ring, WriteRing::Create(fd, path, size, count));
//   UNMOOR_ASSIGN(auto buffer, ring.Take());          // waits for an empty one
//   … fill it …
//   UNMOOR_TRY(ring.Write(buffer.first(n), offset));  // any number of parts of it
//   UNMOOR_TRY(ring.Finish());                        // all is written, or the first error
//
// Buffers are registered with the kernel once. A buffer comes back when its writes are done and the
// next was taken. Where io_uring is not to be had (a seccomp filter, io_uring_disabled), Write does
// its work at once. The first failure (a full disk) is returned by every later call. One thread.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

class WriteRing {
 public:
  // `name` is for messages. `fd` stays the caller's and must outlive this.
  [[nodiscard]] static Result<WriteRing> Create(int fd, std::string name, size_t buffer_size,
                                                unsigned count);
  WriteRing(WriteRing&&) noexcept;
  WriteRing& operator=(WriteRing&&) = delete;
  ~WriteRing();  // waits for what is under way

  [[nodiscard]] Result<std::span<std::byte>> Take();
  // `part` lies in the buffer taken last.
  [[nodiscard]] Result<> Write(std::span<const std::byte> part, FileOffset offset);
  [[nodiscard]] Result<> Finish();

 private:
  class Impl;
  explicit WriteRing(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace unmoor
