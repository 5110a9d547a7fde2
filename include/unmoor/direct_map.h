// DirectMap: an image's memory, usable at once.
//
//   auto map = unmoor::DirectMap::Map(*image);
//   for (const unmoor::MappedRange& range : map->ranges()) Use(range.memory);
//
// Mapping reads nothing: pages come from the image's files as they are touched, and writes stay
// private to the process. As long as memory is direct-mapped the image's files must not be changed
// (deleting them is fine), and where its behaviour differs from anonymous memory (MADV_DONTNEED
// shows the file's bytes again, mremap cannot make it longer with zeros) is listed in
// docs/guarantees.md. BackgroundRemapper moves it to anonymous memory while the program runs.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "unmoor/memory_range.h"
#include "unmoor/page_image.h"
#include "unmoor/status.h"

namespace unmoor {
inline namespace v1 {

enum class Placement {
  kRecorded,  // at the recorded addresses; kBusy, with nothing mapped, when one is occupied
  kAnywhere,  // each range wherever there is room, at the same place within 2 MiB
};

struct MapOptions {
  Placement placement = Placement::kRecorded;
};

struct MappedRange {
  uint64_t recorded_address = 0;
  MemoryRange memory;
  int protection = 0;  // as recorded, and as mapped
};

// Owns the memory: unmaps it when destroyed. Move-only, one thread at a time; the memory itself is
// anybody's. End a BackgroundRemapper of this memory before unmapping it.
class DirectMap {
 public:
  static StatusOr<DirectMap> Map(const PageImage& image, const MapOptions& options = {});
  DirectMap(DirectMap&& other) noexcept;
  DirectMap& operator=(DirectMap&& other) noexcept;
  ~DirectMap();

  [[nodiscard]] const std::vector<MappedRange>& ranges() const;  // ascending by recorded address
  // Where a recorded address is now; null when it is in no range.
  [[nodiscard]] void* Find(uint64_t recorded_address) const;

  // Unmaps everything now. ranges() is empty afterwards.
  Status Unmap();
  // From here on the memory is the program's own, mapped for as long as it likes.
  void Release();

  class Impl;
  [[nodiscard]] const Impl& impl() const { return *impl_; }

 private:
  explicit DirectMap(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace v1
}  // namespace unmoor
