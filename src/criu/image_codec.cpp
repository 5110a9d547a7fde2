// See image_codec.h.
#include "criu/image_codec.h"

#include <bit>
#include <cstring>

#include "os/file.h"

namespace unmoor::criu {
namespace {

static_assert(std::endian::native == std::endian::little, "CRIU images are in host order: little");

constexpr uint32_t kCommonMagic = 0x54564319;

uint32_t ReadU32(std::string_view data, size_t offset) {
  uint32_t value;
  std::memcpy(&value, data.data() + offset, sizeof value);
  return value;
}

void AppendU32(std::string& data, uint32_t value) {
  data.append(reinterpret_cast<const char*>(&value), sizeof value);  // SAFETY: bytes of a u32
}

}  // namespace

Result<RawImage> RawImage::Parse(std::string data, ImageType type, std::string path) {
  RawImage image;
  image.path_ = std::move(path);
  image.data_.assign(data.begin(), data.end());
  const std::string_view bytes(image.data_.data(), image.data_.size());

  size_t offset = 0;
  const auto expect_magic = [&](uint32_t magic) -> Result<> {
    if (bytes.size() < offset + 4) {
      return UserError("{} ends at offset {}, in its header; it is not a whole CRIU image",
                       image.path_, bytes.size());
    }
    const uint32_t found = ReadU32(bytes, offset);
    if (found != magic) {
      return UserError(
          "{}: magic {:#x} at offset {}, {:#x} expected; it is not the CRIU image its name says",
          image.path_, found, offset, magic);
    }
    offset += 4;
    return {};
  };
  if (type != ImageType::kInventory) UNMOOR_TRY(expect_magic(kCommonMagic));
  UNMOOR_TRY(expect_magic(static_cast<uint32_t>(type)));

  while (offset < bytes.size()) {
    const size_t left = bytes.size() - offset;
    if (left < 4) {
      return UserError("{} ends at offset {}, in the length of a message; it is truncated",
                       image.path_, bytes.size());
    }
    const uint32_t length = ReadU32(bytes, offset);
    if (length > kMaxMessage.value) {
      return UserError(
          "{}: a message of {} bytes at offset {} is more than CRIU ever writes; the file is "
          "damaged",
          image.path_, length, offset);
    }
    if (length > left - 4) {
      return UserError(
          "{}: the message at offset {} has {} bytes, but the file ends after {}; it is truncated",
          image.path_, offset, length, left - 4);
    }
    image.messages_.push_back({FileOffset(offset), bytes.substr(offset + 4, length)});
    offset += 4 + size_t{length};
  }
  return image;
}

Result<RawImage> RawImage::Read(const std::string& path, ImageType type) {
  UNMOOR_ASSIGN(std::string data, ReadRegularFile(path, kMaxImage));
  return Parse(std::move(data), type, path);
}

ImageBuilder::ImageBuilder(ImageType type) {
  if (type != ImageType::kInventory) AppendU32(data_, kCommonMagic);
  AppendU32(data_, static_cast<uint32_t>(type));
}

void ImageBuilder::Append(std::string_view message) {
  UNMOOR_CHECK(message.size() <= kMaxMessage.value);
  AppendU32(data_, static_cast<uint32_t>(message.size()));
  data_.append(message);
}

}  // namespace unmoor::criu
