// Image directories with packed layers: made, undone, and unpacked for a restore.
//
// Pack and Unpack make a whole new directory beside the old one, with hard links of everything that
// stays as it is, and publish it by Publisher: DIR is the packed or the plain checkpoint, complete,
// at any moment, and no layer is ever written in place. Manifest and indexes are the same in both
// forms, so it is the same checkpoint.
//
// A restore that maps the pages of a packed directory unpacks them into a hidden directory beside
// it (CacheName), an image directory like any other, which the next restore uses again. It is not
// flushed to disk, so it bears the id of the running system's boot: after a crash of the machine
// nothing takes it for whole. `gc` and `rm` remove it (RemoveCaches), and a restore the older ones.
// Document: docs/format.md, docs/cli.md. Fault points: pack.before_publish, unpack.before_publish,
// cache.before_publish.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/compression.h"
#include "image/manifest.h"

namespace unmoor {

using PackProgress = std::function<void(Bytes done, Bytes total)>;

struct PackReport {
  std::string directory;  // absolute
  size_t layers = 0;      // that changed their form
  Bytes pages;            // bytes of pages in them
  Bytes packed;           // bytes of the packed files
  Nanos elapsed;          // with the publication
  Nanos working;          // packing or unpacking alone
};

// Whether some layer of it is packed.
[[nodiscard]] bool IsPacked(const std::string& directory, const Manifest& manifest);

// `out`: where to; nothing: in place. Layers that have that form already stay as they are.
[[nodiscard]] Result<PackReport> PackDirectory(const std::string& directory,
                                               const std::optional<std::string>& out,
                                               const Compression& compression,
                                               const PackProgress& progress);
[[nodiscard]] Result<PackReport> UnpackDirectory(const std::string& directory,
                                                 const std::optional<std::string>& out,
                                                 const PackProgress& progress);

// Packs layer `entry` of a directory that is still to be published; its .pages is gone afterwards.
// After an error it is there as before.
[[nodiscard]] Result<Bytes> PackLayerIn(const std::string& directory, const ManifestLayer& entry,
                                        const Compression& compression,
                                        const PackProgress& progress);

struct UnpackedCache {
  std::string directory;  // to restore from
  bool reused = false;
  Bytes pages;
  Nanos elapsed;
};

// REQUIRES a read lock on `directory`. Nothing when no layer of it is packed.
[[nodiscard]] Result<std::optional<UnpackedCache>> UnpackForRestore(const std::string& directory,
                                                                    const PackProgress& progress);

// Where an earlier restore has unpacked `directory` as it is now, if one has.
[[nodiscard]] Result<std::optional<std::string>> FindUnpacked(const std::string& directory);

// Whether a directory of that name is such a cache.
[[nodiscard]] bool IsCacheName(std::string_view name);
// The caches of `directory` (absolute), as paths.
[[nodiscard]] std::vector<std::string> CachesOf(const std::string& directory);

}  // namespace unmoor
