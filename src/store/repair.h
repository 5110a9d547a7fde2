// Repair of a damaged layer from another directory that holds the same one, plain or packed each.
//
// The same: its id, and the checksum of its index, which the manifest records and which covers
// every hash. Each block is taken from the damaged file where it still matches its hash, else from
// the other one; both may be damaged, in different places. Of a packed file a whole frame (2 MiB)
// is sound or not. The mended file has the form of the damaged one, is written beside it, fsynced
// and renamed over it: a program that maps the damaged file keeps that, and so do directories that
// hold it by hard link. A file is replaced only when all of it is right. A damaged index is mended
// alone: only then can be told what is wrong with the pages.
#pragma once

#include <string>

#include "base/result.h"
#include "image/manifest.h"
#include "image/verify.h"

namespace unmoor {

// `verdict`: what VerifyLayer or VerifyPackedLayer said of `directory`. Mends the index, or with a
// whole one the pages; returns the verdict about what there is then.
[[nodiscard]] Result<LayerVerdict> RepairLayer(const std::string& directory,
                                               const std::string& from, const ManifestLayer& entry,
                                               const LayerVerdict& verdict);

}  // namespace unmoor
