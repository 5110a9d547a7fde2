// CRIU's image files as a sequence of raw messages, read and written without interpreting them.
//
//   u32 0x54564319, u32 type, { u32 length, protobuf message }*      (inventory: u32 type only)
//
// Every length is checked against the file and a cap before it is used; an error names the file and
// the offset. Messages stay bytes until ParseMessage, so what nobody touches round-trips exactly.
// Pure functions; thread-safe. Format: docs/format.md, "CRIU metadata".
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor::criu {

enum class ImageType : uint32_t {
  kInventory = 0x58313116,
  kPstree = 0x50273030,
  kCore = 0x55053847,
  kMm = 0x57492820,
  kFiles = 0x56303138,
  kPagemap = 0x56084025,
};

// No message of the types above comes near it.
inline constexpr Bytes kMaxMessage{uint64_t{64} << 20};
// Caps the memory an untrusted metadata file may take. A pagemap of 2^24 entries fits.
inline constexpr Bytes kMaxImage{uint64_t{512} << 20};

// An image file in memory. Messages point into `data`.
class RawImage {
 public:
  struct Message {
    FileOffset offset;  // of its length field
    std::string_view bytes;
  };

  // `path` is for messages of errors only.
  [[nodiscard]] static Result<RawImage> Parse(std::string data, ImageType type, std::string path);
  [[nodiscard]] static Result<RawImage> Read(const std::string& path, ImageType type);

  RawImage(RawImage&&) = default;
  RawImage& operator=(RawImage&&) = default;
  RawImage(const RawImage&) = delete;
  RawImage& operator=(const RawImage&) = delete;

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] std::span<const Message> messages() const { return messages_; }

 private:
  RawImage() = default;
  std::string path_;
  std::vector<char> data_;
  std::vector<Message> messages_;
};

// Builds an image file.
class ImageBuilder {
 public:
  explicit ImageBuilder(ImageType type);
  void Append(std::string_view message);
  [[nodiscard]] const std::string& data() const { return data_; }

 private:
  std::string data_;
};

// "FILE: message at offset N is damaged …" unless it parses with every required field.
template <class Message>
[[nodiscard]] Result<Message> ParseMessage(const RawImage& image, const RawImage::Message& raw) {
  Message message;
  if (!message.ParseFromArray(raw.bytes.data(), static_cast<int>(raw.bytes.size()))) {
    return UserError(
        "{}: the {} byte message at offset {} is damaged; restore the file from a copy",
        image.path(), raw.bytes.size(), raw.offset.value);
  }
  return message;
}

}  // namespace unmoor::criu
