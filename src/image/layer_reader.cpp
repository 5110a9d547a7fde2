// See layer_reader.h.
#include "image/layer_reader.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "base/zero.h"
#include "image/index_format.h"
#include "image/layout.h"
#include "os/file.h"

namespace unmoor {
namespace {

// A missing or unreadable file of a checkpoint is the image's fault: the user's error.
Result<Fd> OpenPart(const std::string& path) {
  auto fd = OpenRegularFile(path);
  if (fd) return fd;
  if (fd.error().errnum() == ENOENT) {
    return UserError("{} is missing; the checkpoint is not complete", path);
  }
  return Failure(std::move(fd).error());
}

Result<uint64_t> FileSize(const Fd& fd, const std::string& path) {
  UNMOOR_ASSIGN(const struct stat info, StatFd(fd.get(), path));
  return static_cast<uint64_t>(info.st_size);
}

Result<index_format::Header> ReadHeader(const Fd& fd, const std::string& path) {
  UNMOOR_ASSIGN(const uint64_t size, FileSize(fd, path));
  if (size < index_format::kHeaderSize) {
    return UserError("{} is truncated: {} bytes, its header alone has {}", path, size,
                     index_format::kHeaderSize);
  }
  std::array<std::byte, index_format::kHeaderSize> bytes{};
  UNMOOR_TRY(ReadExactlyAt(fd.get(), bytes, FileOffset(0), path));
  UNMOOR_ASSIGN(index_format::Header header, index_format::DecodeHeader(bytes, path));
  if (size != header.file_bytes()) {
    return UserError("{} {}: it ends at offset {}, not at {}", path,
                     size < header.file_bytes() ? "is truncated" : "has bytes too many", size,
                     header.file_bytes());
  }
  return header;
}

Result<> CheckPagesSize(const Fd& fd, const std::string& path, uint64_t expected) {
  UNMOOR_ASSIGN(const uint64_t size, FileSize(fd, path));
  if (size == expected) return {};
  return UserError("{} {}: it ends at offset {}, not at {} as its index says", path,
                   size < expected ? "is truncated" : "has bytes too many", size, expected);
}

}  // namespace

Result<LayerReader> LayerReader::Open(const std::string& pages_path,
                                      const std::string& index_path) {
  UNMOOR_ASSIGN(Fd pages, OpenPart(pages_path));
  UNMOOR_ASSIGN(LayerReader reader, OpenMapped(std::move(pages), pages_path, index_path));
  UNMOOR_TRY(CheckPagesSize(reader.pages_, pages_path, reader.info_.file_size.value));
  return reader;
}

Result<LayerReader> LayerReader::OpenMapped(Fd pages, const std::string& pages_path,
                                            const std::string& index_path) {
  LayerReader reader;
  reader.pages_path_ = pages_path;
  reader.index_path_ = index_path;
  reader.pages_ = std::move(pages);
  UNMOOR_ASSIGN(reader.index_, OpenPart(index_path));
  UNMOOR_ASSIGN(const index_format::Header header, ReadHeader(reader.index_, index_path));

  std::vector<std::byte> bytes(header.table_bytes());
  UNMOOR_TRY(
      ReadExactlyAt(reader.index_.get(), bytes, FileOffset(index_format::kHeaderSize), index_path));
  UNMOOR_ASSIGN(index_format::Tables tables, index_format::DecodeTables(header, bytes, index_path));
  reader.info_.id = header.id;
  reader.info_.file_size = Bytes(header.pages_size);
  reader.info_.data_bytes = Bytes(header.data_bytes);
  reader.info_.extents = std::move(tables.extents);
  reader.info_.segments = std::move(tables.segments);
  reader.info_.index_checksum = header.header_checksum;
  UNMOOR_ASSIGN(const struct stat of_pages, StatFd(reader.pages_.get(), pages_path));
  UNMOOR_ASSIGN(const struct stat of_index, StatFd(reader.index_.get(), index_path));
  reader.info_.allocated =
      Bytes(static_cast<uint64_t>(of_pages.st_blocks + of_index.st_blocks) * 512);
  reader.hash_offset_ = header.hash_offset();
  reader.hash_count_ = header.hash_count;
  reader.hash_checksum_ = header.hash_checksum;
  return reader;
}

Result<LayerReader> LayerReader::Open(const std::string& dir, const ManifestLayer& entry) {
  const std::string index_path = LayerIndexPath(dir, entry.id);
  if (IsPackedLayer(dir, entry.id)) {
    return UserError("{} is packed; run 'unmoor unpack {}' first", dir, dir);
  }
  UNMOOR_ASSIGN(LayerReader reader, Open(LayerPagesPath(dir, entry.id), index_path));
  const LayerInfo& info = reader.info_;
  if (info.id != entry.id || info.index_checksum != entry.index_checksum ||
      info.file_size != entry.pages_size || info.data_bytes != entry.data) {
    return UserError("{} is not the index that {} means; a file of another checkpoint was put here",
                     index_path, ManifestPath(dir));
  }
  return reader;
}

const Extent* LayerReader::FindExtent(uint32_t task_vpid, Vaddr at) const {
  const auto found = std::ranges::find_if(info_.extents, [&](const Extent& extent) {
    return extent.task_vpid == task_vpid && extent.range.Contains(at);
  });
  return found == info_.extents.end() ? nullptr : &*found;
}

Result<> LayerReader::LoadHashes() {
  if (hashes_loaded_) return {};
  std::vector<std::byte> bytes(hash_count_ * index_format::kHashSize);
  UNMOOR_TRY(ReadExactlyAt(index_.get(), bytes, FileOffset(hash_offset_), index_path_));
  if (index_format::Checksum(bytes) != hash_checksum_) {
    return UserError("{} is damaged at offset {}: the hashes do not match their checksum",
                     index_path_, hash_offset_);
  }
  const std::vector<uint64_t> hashes = index_format::DecodeHashes(bytes);
  hashes_.reserve(hashes.size());
  index_format::ForEachDataBlock(
      info_.segments, [&](uint64_t block) { hashes_.push_back({block, hashes[hashes_.size()]}); });
  hashes_loaded_ = true;
  return {};
}

bool LayerReader::BlockMatches(FileOffset offset, std::span<const std::byte> block) const {
  UNMOOR_CHECK(hashes_loaded_ && offset.value % kBlockSize == 0 && block.size() == kBlockSize);
  const uint64_t number = offset.value / kBlockSize;
  const auto found = std::ranges::lower_bound(hashes_, number, {}, &BlockHash::block);
  if (found == hashes_.end() || found->block != number) return IsZero(block);
  return index_format::Checksum(block) == found->hash;
}

Result<> LayerReader::CheckBlock(FileOffset offset, std::span<const std::byte> block) const {
  if (BlockMatches(offset, block)) return {};
  return UserError("{}: the {} bytes at offset {} do not match their hash; the layer is damaged",
                   pages_path_, kBlockSize, offset.value);
}

Result<> LayerReader::VerifyBlocks(FileRange range) const {
  UNMOOR_CHECK(hashes_loaded_);
  std::vector<std::byte> buffer(kBlockSize);
  auto block =
      std::ranges::lower_bound(hashes_, range.begin.value / kBlockSize, {}, &BlockHash::block);
  for (; block != hashes_.end() && block->block * kBlockSize < range.end.value; ++block) {
    const FileOffset offset(block->block * kBlockSize);
    UNMOOR_TRY(ReadExactlyAt(pages_.get(), buffer, offset, pages_path_));
    if (index_format::Checksum(buffer) != block->hash) {
      return UserError("{} is damaged: the 64 KiB at offset {} do not match their hash",
                       pages_path_, offset.value);
    }
  }
  return {};
}

// What the file system holds as data outside of the hashed blocks must be zeros.
Result<> LayerReader::VerifyHoles() const {
  UNMOOR_ASSIGN(
      const std::vector<FileRange> ranges,
      DataRanges(pages_.get(), {FileOffset(0), FileOffset(info_.file_size.value)}, pages_path_));
  std::vector<std::byte> buffer(kBlockSize);
  auto hashed = hashes_.begin();
  for (const FileRange& range : ranges) {
    const uint64_t end = (range.end.value + kBlockSize - 1) / kBlockSize;
    for (uint64_t block = range.begin.value / kBlockSize; block < end; ++block) {
      while (hashed != hashes_.end() && hashed->block < block) ++hashed;
      if (hashed != hashes_.end() && hashed->block == block) continue;
      const FileOffset offset(block * kBlockSize);
      UNMOOR_TRY(ReadExactlyAt(pages_.get(), buffer, offset, pages_path_));
      if (IsZero(buffer)) continue;
      return UserError("{} is damaged: the 64 KiB at offset {} hold data where there was none",
                       pages_path_, offset.value);
    }
  }
  return {};
}

Result<> LayerReader::VerifyAll(const std::function<void(Bytes, Bytes)>& progress) const {
  UNMOOR_CHECK(hashes_loaded_);
  constexpr size_t kStep = 256;  // blocks: 16 MiB
  const Bytes total(hashes_.size() * kBlockSize);
  for (size_t i = 0; i < hashes_.size(); i += kStep) {
    const size_t last = std::min(i + kStep, hashes_.size()) - 1;
    UNMOOR_TRY(VerifyBlocks({FileOffset(hashes_[i].block * kBlockSize),
                             FileOffset((hashes_[last].block + 1) * kBlockSize)}));
    if (progress) progress(Bytes((last + 1) * kBlockSize), total);
  }
  return VerifyHoles();
}

}  // namespace unmoor
