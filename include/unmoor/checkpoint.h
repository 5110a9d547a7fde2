// Checkpoint: the memory of chosen ranges as an image, in full or as what changed since another
// one.
//
//   unmoor::CheckpointOptions options;
//   options.base = &*image;                        // the image this memory came from
//   auto report = unmoor::Checkpoint(ranges, "/var/lib/heap/2", options);
//
// The new image is complete in itself: layers it shares with `base` are linked into its directory
// (copied across file systems), so `base` may be deleted afterwards, or before, while it is open.
//
// The caller keeps the memory still: writes during Checkpoint make no error, but an image whose
// pages are from different moments (each page is read once). Stop or park the threads that write.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "unmoor/memory_range.h"
#include "unmoor/page_image.h"
#include "unmoor/status.h"

namespace unmoor {
inline namespace v1 {

class DirtyTracker;

struct CheckpointOptions {
  // Null: a full image. Otherwise only pages that differ from what `base` holds at the same
  // addresses are written. Memory that is not in `base` (new, moved, mapped elsewhere than
  // recorded) is written in full; what is in `base` but in no range any more is left out.
  const PageImage* base = nullptr;
  // Null: each page is compared with `base`, exactly (where memory still maps the image, only pages
  // that were copied on write). Otherwise pages of the tracker's ranges that it does not call
  // changed are taken to be as in `base`: REQUIRES that the tracker's baseline was set (Start,
  // Reset) when the memory equalled `base`. The baseline is left as it is: call Reset() before the
  // memory is written again, if the new image shall be the next base.
  DirtyTracker* tracker = nullptr;
  std::string_view user_data;
  bool sync = true;      // as in WriterOptions
  bool replace = false;  // as in WriterOptions
};

// `ranges` as for PageImageWriter::Add.
StatusOr<ImageReport> Checkpoint(std::span<const MemoryRange> ranges, const std::string& dir,
                                 const CheckpointOptions& options = {});

}  // namespace v1
}  // namespace unmoor
