// The .packed file as bytes: its header, frame heads, table and trailer, encoded and decoded.
//
// Pure functions over memory; a decoded value has passed every check of docs/format.md, "Packed
// layer", that can be made with the layer's index at hand. Which frames there are, and how long the
// content of each is, follows from the index alone (PlanFrames) and is not believed when the file
// says otherwise. Errors name the file and the offset in it. Internal to src/image.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/verify.h"

namespace unmoor::packed_format {

inline constexpr size_t kHeaderSize = 128;
inline constexpr size_t kHeadSize = 32;  // of a frame
inline constexpr size_t kTrailerSize = 32;
inline constexpr uint64_t kPieceSize = kHugePageSize;  // of .pages, one frame each

// What follows from the index.
struct Frame {
  uint64_t piece = 0;      // file offset in .pages / 2 MiB
  uint32_t content = 0;    // bytes
  uint32_t run_count = 0;  // runs of pages: FramePlan::runs from first_run on
  size_t first_run = 0;
  size_t first_block = 0;  // LayerIndex::blocks from first_block on
  size_t block_count = 0;

  [[nodiscard]] FileRange range() const {
    return {FileOffset(piece * kPieceSize), FileOffset((piece + 1) * kPieceSize)};
  }
};

struct FramePlan {
  std::vector<Frame> frames;    // ascending
  std::vector<FileRange> runs;  // of .pages, each within one frame, ascending
};

[[nodiscard]] FramePlan PlanFrames(const LayerIndex& index);

// `into` becomes what .pages has in the piece of `frame`: the runs of its content where they
// belong, zeros between them.
void SpreadFrame(const FramePlan& plan, const Frame& frame, std::span<const std::byte> content,
                 std::span<std::byte> into);

struct Header {
  uint32_t codec = 0;
  int32_t level = 0;
};

struct FrameHead {
  uint64_t piece = 0;
  uint32_t content = 0;
  uint32_t stored = 0;
  uint64_t checksum = 0;  // of the stored bytes
  uint64_t place = 0;     // of this head in the file

  bool operator==(const FrameHead&) const = default;
};

[[nodiscard]] std::vector<std::byte> EncodeHeader(const Header& header, const LayerIndex& index,
                                                  size_t frames);
[[nodiscard]] std::vector<std::byte> EncodeHeads(std::span<const FrameHead> heads);
// `table` is the encoded table, `place` its offset.
[[nodiscard]] std::vector<std::byte> EncodeTrailer(std::span<const std::byte> table,
                                                   uint64_t place);

// `bytes` is kHeaderSize long; `frames` as planned.
[[nodiscard]] Result<Header> DecodeHeader(std::span<const std::byte> bytes, const LayerIndex& index,
                                          size_t frames, const std::string& name);
// What precedes and follows the frames in a file of `file_size` bytes; `trailer` is its last
// kTrailerSize bytes. The table's offset.
[[nodiscard]] Result<uint64_t> DecodeTrailer(std::span<const std::byte> trailer, uint64_t file_size,
                                             size_t frames, const std::string& name);
// `table` lies between the frames and the trailer.
[[nodiscard]] Result<std::vector<FrameHead>> DecodeTable(std::span<const std::byte> table,
                                                         std::span<const std::byte> trailer,
                                                         const FramePlan& plan,
                                                         const std::string& name);

}  // namespace unmoor::packed_format
