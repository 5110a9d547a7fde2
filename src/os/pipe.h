// Pipes between us and a child.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "base/result.h"
#include "os/fd.h"

namespace unmoor {

// Both ends close-on-exec.
struct Pipe {
  Fd reader;
  Fd writer;
  [[nodiscard]] static Result<Pipe> Create();
};

// All of it; a reader that is gone is an error (EPIPE), never a signal.
[[nodiscard]] Result<> WritePipe(int fd, std::span<const std::byte> data, const std::string& name);
// Readable, but with nothing in it: no writer is left.
[[nodiscard]] bool PipeHasEnded(int fd);

}  // namespace unmoor
