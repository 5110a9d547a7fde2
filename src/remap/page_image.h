// Telling whether a VMA maps a page image: a layer of ours (…/layers/<id>.pages) or CRIU's own page
// file (pages-<n>.img), as other tools map it. By name, whatever happened to the file since
// (renamed, deleted); no file is opened.
#pragma once

#include "os/procfs.h"

namespace unmoor {

[[nodiscard]] bool MapsPageImage(const VmaInfo& vma);

}  // namespace unmoor
