// Where pages go: the layout of a layer's .pages file and the names inside an image directory.
//
// LayoutAllocator gives each mapped VMA one extent, at a file offset congruent to its address
// modulo 2 MiB (so that huge pages and 2 MiB batches line up), followed by a sparse gap that reads
// zero when the program grows the VMA while it is still mapped. Pure: no system calls. Document:
// docs/format.md, "Layer: .pages".
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

inline constexpr uint32_t kFormatVersion = 1;
inline constexpr uint64_t kBlockSize = 64 << 10;               // the unit of hashing
inline constexpr uint64_t kMaxLayerSize = uint64_t{15} << 40;  // sparse; ext4 ends at 16 TiB
inline constexpr uint64_t kGapRegion = uint64_t{8} << 40;      // beyond it gaps are the smallest
inline constexpr uint64_t kMaxGrowthGap = uint64_t{16} << 30;
inline constexpr uint64_t kAddressLimit = uint64_t{1} << 56;  // x86-64 with 5 levels
inline constexpr uint64_t kMaxExtents = uint64_t{1} << 20;
inline constexpr uint64_t kMaxSegments = uint64_t{1} << 26;
inline constexpr size_t kMaxDeltas = 64;  // over one another
inline constexpr Bytes kMaxUserData(uint64_t{256} << 20);
inline constexpr uint32_t kMemoryTask = 1;    // the one task of an image of memory ranges
inline constexpr size_t kLayerIdLength = 32;  // lower-case hexadecimal digits

class LayoutAllocator {
 public:
  // The file offset of a new extent for `range` (page-aligned, not empty).
  [[nodiscard]] Result<FileOffset> Allocate(VaddrRange range);
  // Size of the file with the last gap: a multiple of 2 MiB.
  [[nodiscard]] Bytes file_size() const { return Bytes(used_); }

 private:
  uint64_t used_ = 0;
};

// 32 random lower-case hexadecimal digits: for layers and checkpoints.
[[nodiscard]] Result<std::string> NewId();
[[nodiscard]] bool IsValidId(std::string_view id);

// A layer's files are its id and one of these.
inline constexpr std::string_view kPagesSuffix = ".pages";
inline constexpr std::string_view kIndexSuffix = ".index";
inline constexpr std::string_view kPackedSuffix = ".packed";

// Names inside an image directory `dir`.
[[nodiscard]] std::string ManifestPath(const std::string& dir);     // DIR/manifest.json
[[nodiscard]] std::string CriuDirectory(const std::string& dir);    // DIR/criu
[[nodiscard]] std::string UserDataPath(const std::string& dir);     // DIR/user_data
[[nodiscard]] std::string WorkingSetPath(const std::string& dir);   // DIR/working_set
[[nodiscard]] std::string LayersDirectory(const std::string& dir);  // DIR/layers
[[nodiscard]] std::string LayerPagesPath(const std::string& dir, const std::string& id);
[[nodiscard]] std::string LayerPackedPath(const std::string& dir, const std::string& id);
[[nodiscard]] std::string LayerIndexPath(const std::string& dir, const std::string& id);

// A working set while it is written has this behind its name.
inline constexpr std::string_view kFreshSuffix = ".new";

// Whether an image directory may hold something of that name.
[[nodiscard]] bool IsImagePart(std::string_view name);

// Whether the layer is there in its packed form only.
[[nodiscard]] bool IsPackedLayer(const std::string& dir, const std::string& id);

}  // namespace unmoor
