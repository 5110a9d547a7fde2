// See file_window.h.
#include "image/file_window.h"

#include <sys/mman.h>

#include <utility>

#include "os/file.h"
#include "os/own_memory.h"

namespace unmoor {

FileWindow::FileWindow(FileWindow&& other) noexcept
    : room_(std::exchange(other.room_, {})), shows_(std::exchange(other.shows_, kNothing)) {}

FileWindow& FileWindow::operator=(FileWindow&& other) noexcept {
  std::swap(room_, other.room_);
  std::swap(shows_, other.shows_);
  return *this;
}

FileWindow::~FileWindow() {
  if (!room_.empty()) (void)UnmapMemory(room_);
}

std::span<const std::byte> FileWindow::Look(int fd, FileRange range) {
  const FileOffset begin(AlignDown(range.begin.value, kSize));
  if (room_.empty()) room_ = ReserveAddresses(Bytes(kSize), 0).value_or(VaddrRange());
  if (room_.empty()) return {};
  // A mapping shows zeros behind the end of a file, as far as its last page goes.
  const auto info = StatFd(fd, "");
  const bool whole = info && static_cast<uint64_t>(info->st_size) >= range.end.value;
  const bool mapped =
      whole && (shows_ == begin || MapFilePrivately(fd, begin, room_, PROT_READ, MapAt::kReplace));
  const Vaddr at = room_.begin + (range.begin - begin);
  const bool seen = mapped && PopulateForReading({at, at + range.size()});
  shows_ = seen ? begin : kNothing;
  if (!seen) return {};
  // SAFETY: in a mapping of ours.
  return {reinterpret_cast<const std::byte*>(at.value), range.size().value};
}

}  // namespace unmoor
