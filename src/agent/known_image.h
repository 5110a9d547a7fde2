// Which image directory a running program was last restored from or dumped into.
//
// A small file per process in the runtime directory, for the next dump to find its parent by. Only
// a hint: the program may have changed in any way since, the directory may be gone or replaced.
// Never an error.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/units.h"

namespace unmoor {

inline constexpr std::string_view kKnownImageSuffix = ".image";

struct KnownImage {
  std::string directory;  // absolute
  std::string checkpoint_id;
};

// Of all these processes. Those that have ended are forgotten with their progress files
// (progress_file.h).
void RememberImage(std::span<const Pid> pids, const KnownImage& image);
[[nodiscard]] std::optional<KnownImage> FindKnownImage(Pid pid);

}  // namespace unmoor
