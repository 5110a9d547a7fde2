// mm-<vpid>.img as protobuf, for the files of this room only (keeps protobuf out of metadata.h).
#pragma once

#include <string>

#include "base/result.h"
#include "criu/metadata.h"
#include "proto/image.pb.h"

namespace unmoor::criu {

struct MmImage {
  std::string path;
  proto::MmEntry entry;  // every VMA a non-empty, page-aligned range

  [[nodiscard]] static Result<MmImage> Read(const std::string& criu_directory, uint32_t vpid);
};

[[nodiscard]] Vma FromEntry(const proto::VmaEntry& entry);

}  // namespace unmoor::criu
