// See index_writer.h.
#include "image/index_writer.h"

#include <span>
#include <vector>

#include "base/fault_point.h"
#include "image/block_hash.h"
#include "image/index_format.h"
#include "image/layout.h"
#include "os/file.h"

namespace unmoor {
namespace {

Result<std::vector<uint64_t>> HashBlocks(int fd, const std::string& path,
                                         std::span<const Segment> segments) {
  std::vector<uint64_t> hashes;
  std::vector<std::byte> block(kBlockSize);
  Result<> read;
  index_format::ForEachDataBlock(segments, [&](uint64_t number) {
    if (!read) return;
    read = ReadExactlyAt(fd, block, FileOffset(number * kBlockSize), path);
    hashes.push_back(HashOf(block));
  });
  UNMOOR_TRY(read);
  return hashes;
}

Result<> WriteLayerIndex(const LayerFiles& files, LayerInfo& info) {
  if (info.segments.size() > kMaxSegments) {
    return MachineError("{}: more than {} runs of pages", files.index_path, kMaxSegments);
  }
  UNMOOR_ASSIGN(const std::vector<uint64_t> hashes,
                HashBlocks(files.pages_fd, files.pages_path, info.segments));
  const auto tables = index_format::EncodeTables(info.extents, info.segments);
  const auto encoded = index_format::EncodeHashes(hashes);
  index_format::Header header;
  header.id = info.id;
  header.pages_size = info.file_size.value;
  header.data_bytes = info.data_bytes.value;
  header.extent_count = info.extents.size();
  header.segment_count = info.segments.size();
  header.hash_count = hashes.size();
  header.hash_checksum = index_format::Checksum(encoded);
  header.table_checksum = index_format::Checksum(tables);
  const auto head = index_format::EncodeHeader(header);
  info.index_checksum = header.header_checksum;
  UNMOOR_TRY(WriteExactlyAt(files.index_fd, head, FileOffset(0), files.index_path));
  UNMOOR_TRY(WriteExactlyAt(files.index_fd, tables, FileOffset(head.size()), files.index_path));
  return WriteExactlyAt(files.index_fd, encoded, FileOffset(header.hash_offset()),
                        files.index_path);
}

// What both files take on the disk.
Result<Bytes> AllocatedBytes(const LayerFiles& files) {
  UNMOOR_ASSIGN(const struct stat pages, StatFd(files.pages_fd, files.pages_path));
  UNMOOR_ASSIGN(const struct stat index, StatFd(files.index_fd, files.index_path));
  return Bytes(static_cast<uint64_t>(pages.st_blocks + index.st_blocks) * 512);
}

}  // namespace

Result<> FinishLayer(const LayerFiles& files, bool sync, LayerInfo& info) {
  UNMOOR_TRY(FaultPoint("layer.before_sync"));
  UNMOOR_TRY(WriteLayerIndex(files, info));
  if (sync) {
    UNMOOR_TRY(SyncFd(files.pages_fd, files.pages_path));
    UNMOOR_TRY(SyncFd(files.index_fd, files.index_path));
  }
  UNMOOR_ASSIGN(info.allocated, AllocatedBytes(files));
  return {};
}

}  // namespace unmoor
