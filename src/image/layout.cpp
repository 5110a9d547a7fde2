// See layout.h.
#include "image/layout.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <span>

#include "os/file.h"

namespace unmoor {
namespace {

uint64_t GrowthGap(uint64_t extent_end) {
  const uint64_t share = (kGapRegion - std::min(extent_end, kGapRegion)) / 256;
  return AlignDown(std::clamp(share, kHugePageSize, kMaxGrowthGap), kHugePageSize);
}

}  // namespace

Result<FileOffset> LayoutAllocator::Allocate(VaddrRange range) {
  if (range.empty() || range.begin.value % kPageSize != 0 || range.end.value % kPageSize != 0 ||
      range.end.value > kAddressLimit) {
    return MachineError("{} is no range of pages, it cannot get a place in a layer", range);
  }
  const uint64_t begin = used_ + range.begin.value % kHugePageSize;
  if (range.size().value > kMaxLayerSize - std::min(begin, kMaxLayerSize)) {
    return MachineError("no room for {} ({}) in a layer, which holds {} of address space", range,
                        HumanBytes(range.size()), HumanBytes(Bytes(kMaxLayerSize)));
  }
  const uint64_t end = begin + range.size().value;
  const uint64_t used = AlignUp(end + GrowthGap(end), kHugePageSize);
  if (used > kMaxLayerSize) {
    return MachineError("no room after {} in a layer, which holds {} of address space", range,
                        HumanBytes(Bytes(kMaxLayerSize)));
  }
  used_ = used;
  return FileOffset(begin);
}

Result<std::string> NewId() {
  UNMOOR_ASSIGN(const Fd random, OpenFile("/dev/urandom", O_RDONLY));
  std::array<std::byte, kLayerIdLength / 2> bytes{};
  UNMOOR_ASSIGN(const size_t n, ReadStream(random.get(), bytes, "/dev/urandom"));
  if (n != bytes.size()) return MachineError("/dev/urandom gave no random bytes");
  std::string id;
  for (const std::byte b : bytes) id += fmt::format("{:02x}", static_cast<unsigned>(b));
  return id;
}

bool IsValidId(std::string_view id) {
  return id.size() == kLayerIdLength &&
         id.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

std::string ManifestPath(const std::string& dir) {
  return dir + "/manifest.json";
}
std::string CriuDirectory(const std::string& dir) {
  return dir + "/criu";
}
std::string WorkingSetPath(const std::string& dir) {
  return dir + "/working_set";
}

bool IsImagePart(std::string_view name) {
  return name == "manifest.json" || name == "criu" || name == "layers" || name == "user_data" ||
         name == "working_set" || name == "working_set.new" || name.ends_with(".log");
}

std::string UserDataPath(const std::string& dir) {
  return dir + "/user_data";
}
std::string LayersDirectory(const std::string& dir) {
  return dir + "/layers";
}
namespace {

std::string LayerFile(const std::string& dir, const std::string& id, std::string_view suffix) {
  return fmt::format("{}/{}{}", LayersDirectory(dir), id, suffix);
}

}  // namespace

std::string LayerPagesPath(const std::string& dir, const std::string& id) {
  return LayerFile(dir, id, kPagesSuffix);
}
std::string LayerPackedPath(const std::string& dir, const std::string& id) {
  return LayerFile(dir, id, kPackedSuffix);
}
std::string LayerIndexPath(const std::string& dir, const std::string& id) {
  return LayerFile(dir, id, kIndexSuffix);
}

bool IsPackedLayer(const std::string& dir, const std::string& id) {
  return !Exists(LayerPagesPath(dir, id)) && Exists(LayerPackedPath(dir, id));
}

}  // namespace unmoor
