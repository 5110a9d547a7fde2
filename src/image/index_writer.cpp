// See index_writer.h.
#include "image/index_writer.h"

#include <xxhash.h>

#include <span>
#include <vector>

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
    hashes.push_back(XXH3_64bits(block.data(), block.size()));
  });
  UNMOOR_TRY(read);
  return hashes;
}

}  // namespace

Result<> WriteLayerIndex(int pages_fd, const std::string& pages_path, int index_fd,
                         const std::string& index_path, LayerInfo& info) {
  if (info.segments.size() > kMaxSegments) {
    return MachineError("{}: more than {} runs of pages", index_path, kMaxSegments);
  }
  UNMOOR_ASSIGN(const std::vector<uint64_t> hashes,
                HashBlocks(pages_fd, pages_path, info.segments));
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
  UNMOOR_TRY(WriteExactlyAt(index_fd, head, FileOffset(0), index_path));
  UNMOOR_TRY(WriteExactlyAt(index_fd, tables, FileOffset(head.size()), index_path));
  return WriteExactlyAt(index_fd, encoded, FileOffset(header.hash_offset()), index_path);
}

Result<Bytes> AllocatedBytes(int pages_fd, const std::string& pages_path, int index_fd,
                             const std::string& index_path) {
  UNMOOR_ASSIGN(const struct stat pages, StatFd(pages_fd, pages_path));
  UNMOOR_ASSIGN(const struct stat index, StatFd(index_fd, index_path));
  return Bytes(static_cast<uint64_t>(pages.st_blocks + index.st_blocks) * 512);
}

}  // namespace unmoor
