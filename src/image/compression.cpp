// See compression.h.
#include "image/compression.h"

#include <lz4.h>
#include <lz4hc.h>
#include <zstd.h>

#include <algorithm>
#include <charconv>
#include <cstring>

namespace unmoor {
namespace {

constexpr int kDefaultZstdLevel = 3;
constexpr int kMaxZstdLevel = 19;

// SAFETY: char may alias any object.
const char* Source(std::span<const std::byte> bytes) {
  return reinterpret_cast<const char*>(bytes.data());
}
char* Target(std::span<std::byte> bytes) {
  return reinterpret_cast<char*>(bytes.data());
}

}  // namespace

Result<Compression> ParseCompression(const std::string& text) {
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  Compression compression;
  int least = 0;
  int most = LZ4HC_CLEVEL_MAX;
  if (name == "zstd") {
    compression = {Codec::kZstd, kDefaultZstdLevel};
    least = 1;
    most = kMaxZstdLevel;
  } else if (name != "lz4") {
    return UserError("'{}' is no compression; give lz4, lz4:LEVEL, zstd or zstd:LEVEL", text);
  }
  if (colon == std::string::npos) return compression;
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data() + colon + 1, end, compression.level);
  if (parsed.ec == std::errc() && parsed.ptr == end && compression.level >= least &&
      compression.level <= most) {
    return compression;
  }
  return UserError("'{}': the level of {} is {} to {}", text, name, least, most);
}

std::string ToString(const Compression& compression) {
  const char* const name = compression.codec == Codec::kLz4 ? "lz4" : "zstd";
  if (compression.codec == Codec::kLz4 && compression.level == 0) return name;
  return fmt::format("{}:{}", name, compression.level);
}

struct Compressor::Contexts {
  std::unique_ptr<ZSTD_CCtx, size_t (*)(ZSTD_CCtx*)> zstd{nullptr, ZSTD_freeCCtx};
};

Compressor::Compressor(Compression compression)
    : compression_(compression), contexts_(std::make_unique<Contexts>()) {}
Compressor::Compressor(Compressor&&) noexcept = default;
Compressor::~Compressor() = default;

Result<std::span<const std::byte>> Compressor::Compress(std::span<const std::byte> content) {
  size_t size = 0;
  if (compression_.codec == Codec::kLz4) {
    const int length = static_cast<int>(content.size());
    output_.resize(static_cast<size_t>(LZ4_compressBound(length)));
    const int room = static_cast<int>(output_.size());
    const int made =
        compression_.level == 0
            ? LZ4_compress_default(Source(content), Target(output_), length, room)
            : LZ4_compress_HC(Source(content), Target(output_), length, room, compression_.level);
    if (made <= 0) return MachineError("LZ4 could not compress {} bytes", content.size());
    size = static_cast<size_t>(made);
  } else {
    if (!contexts_->zstd) contexts_->zstd.reset(ZSTD_createCCtx());
    if (!contexts_->zstd) return MachineError("no memory for Zstandard");
    output_.resize(ZSTD_compressBound(content.size()));
    size = ZSTD_compressCCtx(contexts_->zstd.get(), output_.data(), output_.size(), content.data(),
                             content.size(), compression_.level);
    if (ZSTD_isError(size) != 0) {
      return MachineError("Zstandard could not compress {} bytes: {}", content.size(),
                          ZSTD_getErrorName(size));
    }
  }
  if (size >= content.size()) return content;
  return std::span<const std::byte>(output_).first(size);
}

struct Decompressor::Contexts {
  std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> zstd{nullptr, ZSTD_freeDCtx};
};

Decompressor::Decompressor() : contexts_(std::make_unique<Contexts>()) {}
Decompressor::Decompressor(Decompressor&&) noexcept = default;
Decompressor::~Decompressor() = default;

bool Decompressor::Decompress(Codec codec, std::span<const std::byte> stored,
                              std::span<std::byte> content) {
  if (stored.size() == content.size()) {
    std::memcpy(content.data(), stored.data(), stored.size());
    return true;
  }
  if (codec == Codec::kLz4) {
    const int made =
        LZ4_decompress_safe(Source(stored), Target(content), static_cast<int>(stored.size()),
                            static_cast<int>(content.size()));
    return made >= 0 && static_cast<size_t>(made) == content.size();
  }
  if (!contexts_->zstd) contexts_->zstd.reset(ZSTD_createDCtx());
  if (!contexts_->zstd) return false;
  return ZSTD_decompressDCtx(contexts_->zstd.get(), content.data(), content.size(), stored.data(),
                             stored.size()) == content.size();
}

}  // namespace unmoor
