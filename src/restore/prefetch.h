// Prefetch: the working set of an image is read ahead, while criu starts.
//
// A process of its own asks the kernel to read the ranges into the page cache, in their order,
// neighbours merged into large requests, and ends. Nothing waits for it: a page that has not come
// when the program touches it is waited for as any other.
#pragma once

#include <optional>
#include <string>

#include "base/result.h"
#include "image/working_set.h"
#include "os/daemon.h"

namespace unmoor {

struct Prefetch {
  StartingDaemon reader;
  WorkingSet set;
};

// Nothing when the image has no working set, or one that cannot be read, which is said. Call it
// with one thread only, and not as a subreaper.
[[nodiscard]] std::optional<Prefetch> BeginPrefetch(const std::string& directory);

}  // namespace unmoor
