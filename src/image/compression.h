// Compression of one frame: LZ4 or Zstandard, nothing of the file's form.
//
// Decompression trusts nothing: it writes exactly the bytes asked for or says that it cannot.
// Compressor and Decompressor keep their working memory; one thread each. Internal to src/image but
// for Compression, which users choose.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"

namespace unmoor {

enum class Codec { kLz4 = 1, kZstd = 2 };  // the numbers of docs/format.md

struct Compression {
  Codec codec = Codec::kLz4;
  int level = 0;  // lz4: 0 fast, 1 to 12 better; zstd: 1 to 19
};

// "lz4", "lz4:9", "zstd" (level 3), "zstd:1".
[[nodiscard]] Result<Compression> ParseCompression(const std::string& text);
[[nodiscard]] std::string ToString(const Compression& compression);

class Compressor {
 public:
  explicit Compressor(Compression compression);
  Compressor(Compressor&&) noexcept;
  ~Compressor();
  // Valid until the next call; `content` itself where it does not get smaller.
  [[nodiscard]] Result<std::span<const std::byte>> Compress(std::span<const std::byte> content);

 private:
  struct Contexts;
  Compression compression_;
  std::unique_ptr<Contexts> contexts_;
  std::vector<std::byte> output_;
};

class Decompressor {
 public:
  Decompressor();
  Decompressor(Decompressor&&) noexcept;
  ~Decompressor();
  // False: `stored` is not what a compressor makes of content.size() bytes.
  [[nodiscard]] bool Decompress(Codec codec, std::span<const std::byte> stored,
                                std::span<std::byte> content);

 private:
  struct Contexts;
  std::unique_ptr<Contexts> contexts_;
};

}  // namespace unmoor
