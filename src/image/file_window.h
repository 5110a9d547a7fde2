// FileWindow: pages of a file, looked at through a mapping that moves along, without copying them.
//
// A look has all of its pages there first; what cannot be had is seen as nothing, and reading the
// file tells why. A page that the kernel drops and then cannot read again, within the moment in
// which it is used, ends the process (SIGBUS). One thread.
#pragma once

#include <cstddef>
#include <span>

#include "base/result.h"
#include "base/units.h"
#include "image/layout.h"

namespace unmoor {

class FileWindow {
 public:
  static constexpr uint64_t kSize = kHugePageSize;

  FileWindow() = default;
  FileWindow(FileWindow&& other) noexcept;
  FileWindow& operator=(FileWindow&& other) noexcept;
  ~FileWindow();

  // What `fd` has in `range`, which lies in one window (of kSize, aligned), until the next call;
  // always the same file. Empty: not to be had.
  [[nodiscard]] std::span<const std::byte> Look(int fd, FileRange range);
  // Where the window begins that was looked through last. False: nothing was seen.
  [[nodiscard]] bool Shows(FileOffset begin) const { return shows_ == begin; }

 private:
  static constexpr FileOffset kNothing{~uint64_t{0}};

  VaddrRange room_;  // owned; empty: none to be had
  FileOffset shows_ = kNothing;
};

}  // namespace unmoor
