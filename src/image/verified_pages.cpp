// See verified_pages.h.
#include "image/verified_pages.h"

#include <algorithm>

#include "os/file.h"

namespace unmoor {
namespace {

FileOffset WindowOf(FileOffset at) {
  return FileOffset(AlignDown(at.value, FileWindow::kSize));
}

}  // namespace

Result<std::span<const std::byte>> VerifiedPages::Look(const LayerReader& layer, Window& window,
                                                       FileRange blocks) {
  if (!window.file.Shows(WindowOf(blocks.begin))) window.verified.reset();
  const auto seen = window.file.Look(layer.pages_fd().get(), blocks);
  if (!seen.empty()) return seen;
  // Which also tells what is wrong.
  buffer_.resize(blocks.size().value);
  window.verified.reset();
  UNMOOR_TRY(ReadExactlyAt(layer.pages_fd().get(), buffer_, blocks.begin, layer.pages_path()));
  return std::span<const std::byte>(buffer_);
}

Result<std::span<const std::byte>> VerifiedPages::InFrame(uint32_t layer, FileRange range) {
  const LayerSource& source = *layers_[layer];
  const uint64_t size = source.piece_size();
  const FileOffset begin(AlignDown(range.begin.value, size));
  const FileRange part{range.begin, std::min(range.end, begin + Bytes(size))};
  auto frame = std::ranges::find_if(frames_, [&](const Frame& one) {
    return one.layer == layer && one.begin == begin && one.used > 0;
  });
  if (frame == frames_.end()) {
    const bool more = frames_.size() < kFrames;
    frame =
        more ? frames_.emplace(frames_.end()) : std::ranges::min_element(frames_, {}, &Frame::used);
    frame->bytes.resize(size);
    frame->used = 0;  // what it holds is nothing should this fail
    UNMOOR_TRY(source.ReadPiece(begin, frame->bytes, scratch_));
    frame->layer = layer;
    frame->begin = begin;
  }
  frame->used = ++turns_;
  return std::span<const std::byte>(frame->bytes)
      .subspan((part.begin - begin).value, part.size().value);
}

Result<std::span<const std::byte>> VerifiedPages::At(uint32_t layer, FileRange range) {
  if (layers_[layer]->plain() == nullptr) return InFrame(layer, range);
  const LayerReader& reader = *layers_[layer]->plain();
  Window& window = windows_[layer];
  const FileOffset limit(AlignDown(range.begin.value, kMost) + kMost);
  const FileRange part{range.begin, std::min(range.end, limit)};
  const FileRange blocks{FileOffset(AlignDown(part.begin.value, kBlockSize)),
                         FileOffset(AlignUp(part.end.value, kBlockSize))};
  UNMOOR_ASSIGN(const std::span<const std::byte> bytes, Look(reader, window, blocks));
  for (uint64_t at = 0; at < bytes.size(); at += kBlockSize) {
    const FileOffset offset = blocks.begin + Bytes(at);
    const size_t number = offset.value % FileWindow::kSize / kBlockSize;
    if (window.verified.test(number)) continue;
    UNMOOR_TRY(reader.CheckBlock(offset, bytes.subspan(at, kBlockSize)));
    if (window.file.Shows(WindowOf(offset))) window.verified.set(number);
  }
  return bytes.subspan((part.begin - blocks.begin).value, part.size().value);
}

}  // namespace unmoor
