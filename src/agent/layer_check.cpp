// See layer_check.h.
#include "agent/layer_check.h"

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <span>
#include <string_view>

#include "image/layout.h"
#include "os/daemon.h"
#include "os/file.h"

namespace unmoor {
namespace {

constexpr uint64_t kAtOnce = uint64_t{256} << 10;  // stays in the cache

}  // namespace

LayerCheck::LayerCheck(int file, const VmaInfo& mapping, bool hashes)
    : file_(file), path_(mapping.name) {
  if (!hashes) {
    unchecked_ = "not to be verified";
    return;
  }
  auto layer = OpenIndex(file);
  if (layer) {
    if (auto loaded = layer->LoadHashes(); !loaded) layer = Failure(loaded.error());
  }
  unchecked_ = layer ? "" : layer.error().message();
  if (!layer) return;
  layer_ = std::move(*layer);
  buffer_.resize(kBlockSize);
}

Result<LayerReader> LayerCheck::OpenIndex(int file) const {
  if (!path_.ends_with(kPagesSuffix)) {
    return UserError("{} is no layer, or was deleted", path_);
  }
  UNMOOR_ASSIGN(const struct stat named, Stat(path_));
  UNMOOR_ASSIGN(const struct stat mapped, StatFd(file, path_));
  if (named.st_ino != mapped.st_ino || named.st_dev != mapped.st_dev) {
    return UserError("{} is another file than the one that is mapped", path_);
  }
  UNMOOR_ASSIGN(Fd pages, Duplicate(file));
  const std::string stem = path_.substr(0, path_.size() - kPagesSuffix.size());
  return LayerReader::OpenMapped(std::move(pages), path_, stem + std::string(kIndexSuffix));
}

bool LayerCheck::MoreFollows(FileOffset end) const {
  std::optional<LayerReader> opened;
  if (!layer_) {
    auto index = OpenIndex(file_);
    if (!index) return false;
    opened = std::move(*index);
  }
  const LayerReader* const layer = layer_ ? &*layer_ : &*opened;
  const std::vector<Extent>& extents = layer->extents();
  const auto extent = std::ranges::partition_point(
      extents, [&](const Extent& e) { return e.file_range().end <= end; });
  if (extent == extents.end() || extent->offset >= end) return false;
  const std::vector<Segment>& segments = layer->segments();
  const auto next = std::ranges::partition_point(
      segments, [&](const Segment& s) { return s.file_range().end <= end; });
  return next != segments.end() && next->offset < extent->file_range().end;
}

std::optional<LayerCheck::Damage> LayerCheck::Truncated(FileOffset end) const {
  const auto info = StatFd(file_, path_);
  if (!info) return std::nullopt;
  const auto size = static_cast<uint64_t>(info->st_size);
  // The page that the end of the file lies in can be read, and is zeros behind it.
  if (AlignUp(size, kPageSize) >= end.value) return std::nullopt;
  // Of a layer, that page may be short of bytes.
  const uint64_t first = layer_ ? AlignDown(size, kBlockSize) : AlignUp(size, kPageSize);
  return Damage{{FileOffset(first), end}, EndsAt(size)};
}

std::string LayerCheck::EndsAt(uint64_t size) const {
  return fmt::format("{} was truncated: it ends at offset {}", path_, size);
}

std::vector<FileRange> LayerCheck::Missing(FileRange range,
                                           const std::vector<FileRange>& data) const {
  std::vector<FileRange> missing;
  if (!layer_) return missing;
  const std::vector<Segment>& segments = layer_->segments();
  auto segment = std::ranges::partition_point(
      segments, [&](const Segment& s) { return s.offset + s.range.size() <= range.begin; });
  auto shown = data.begin();
  for (; segment != segments.end() && segment->offset < range.end; ++segment) {
    const FileRange part = segment->file_range().Intersect(range);
    FileOffset at = part.begin;
    while (shown != data.end() && shown->end <= at) ++shown;
    for (auto next = shown; at < part.end; ++next) {
      const bool last = next == data.end() || next->begin >= part.end;
      const FileOffset end = last ? part.end : next->begin;
      if (at < end) missing.push_back({at, end});
      if (last) break;
      at = std::max(at, next->end);
    }
  }
  return missing;
}

Result<std::vector<LayerCheck::Damage>> LayerCheck::Lost(FileRange range,
                                                         const std::vector<FileRange>& data) {
  std::vector<Damage> lost;
  FileOffset checked;
  for (const FileRange& missing : Missing(range, data)) {
    if (zeros_.contains(missing)) continue;
    UNMOOR_ASSIGN(std::vector<Damage> found, Look(missing, checked));
    if (found.empty()) zeros_.insert(missing);
    std::ranges::move(found, std::back_inserter(lost));
  }
  return lost;
}

Result<std::vector<LayerCheck::Damage>> LayerCheck::Look(FileRange range, FileOffset& checked) {
  std::vector<Damage> found;
  if (!layer_) return found;
  const FileOffset end(AlignUp(range.end.value, kBlockSize));
  const auto say = [&](FileOffset block, std::string_view what) {
    found.push_back({{block, block + Bytes(kBlockSize)},
                     fmt::format("{} {} at offset {}", path_, what, block.value)});
  };
  for (FileOffset at = std::max(checked, FileOffset(AlignDown(range.begin.value, kBlockSize)));
       at < end;) {
    const FileOffset piece_end(AlignDown(at.value, kAtOnce) + kAtOnce);
    const Bytes size = std::min(piece_end, end) - at;
    const auto seen = window_.Look(file_, {at, at + size});
    for (uint64_t i = 0; i < size.value; i += kBlockSize) {
      const FileOffset block = at + Bytes(i);
      const auto bytes =
          seen.empty() ? std::span<const std::byte>(buffer_) : seen.subspan(i, kBlockSize);
      // Which of them could not be read.
      const Result<> alone =
          seen.empty() ? ReadExactlyAt(file_, buffer_, block, path_) : Result<>();
      if (!alone) {
        const int errnum = alone.error().errnum();
        if (errnum != 0 && errnum != EIO) return Failure(alone.error());
        if (errnum == 0) {
          UNMOOR_ASSIGN(const struct stat info, StatFd(file_, path_));
          found.push_back({{block, end}, EndsAt(static_cast<uint64_t>(info.st_size))});
          checked = std::max(checked, end);
          return found;
        }
        say(block, "cannot be read (EIO)");
      } else if (!layer_->BlockMatches(block, bytes)) {
        say(block, "is damaged: its hash does not match the 64 KiB");
      }
    }
    at = at + size;
  }
  checked = std::max(checked, end);
  return found;
}

}  // namespace unmoor
