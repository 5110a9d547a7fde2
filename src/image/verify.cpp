// See verify.h.
#include "image/verify.h"

#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>

#include "base/zero.h"
#include "image/layout.h"
#include "os/file.h"

namespace unmoor {
namespace {

constexpr unsigned kMaxThreads = 8;
constexpr size_t kItemBlocks = 64;  // 4 MiB: what a thread takes at once
constexpr size_t kReadBlocks = 4;   // 256 KiB: stays in the cache from read to hash

// Neighbouring blocks to check: with hashes from `hash` on, or, without, to be zero.
struct WorkItem {
  uint64_t block = 0;
  uint32_t count = 0;
  std::optional<size_t> hash;
};

struct Finding {
  uint64_t block = 0;
  bool hashed = false;
  std::string why;  // of a failed read; empty: the content is wrong
};

// Hashed blocks that lie in the file, in pieces of neighbours.
void AddHashedBlocks(const LayerIndex& index, uint64_t file_blocks, std::vector<WorkItem>& items) {
  for (size_t i = 0; i < index.blocks.size() && index.blocks[i] < file_blocks; ++i) {
    WorkItem* const last = items.empty() ? nullptr : &items.back();
    if (last != nullptr && last->count < kItemBlocks &&
        last->block + last->count == index.blocks[i]) {
      ++last->count;
    } else {
      items.push_back({index.blocks[i], 1, i});
    }
  }
}

// What the file system holds as data outside of the hashed blocks.
Result<> AddOtherData(const Fd& pages, const std::string& path, const LayerIndex& index,
                      uint64_t file_blocks, std::vector<WorkItem>& items) {
  UNMOOR_ASSIGN(
      const std::vector<FileRange> ranges,
      DataRanges(pages.get(), {FileOffset(0), FileOffset(file_blocks * kBlockSize)}, path));
  auto hashed = index.blocks.begin();
  uint64_t next = 0;
  for (const FileRange& range : ranges) {
    const uint64_t end = std::min(file_blocks, (range.end.value + kBlockSize - 1) / kBlockSize);
    for (uint64_t block = std::max(next, range.begin.value / kBlockSize); block < end; ++block) {
      next = block + 1;
      while (hashed != index.blocks.end() && *hashed < block) ++hashed;
      if (hashed != index.blocks.end() && *hashed == block) continue;
      WorkItem* const last = items.empty() ? nullptr : &items.back();
      if (last != nullptr && !last->hash && last->count < kItemBlocks &&
          last->block + last->count == block) {
        ++last->count;
      } else {
        items.push_back({block, 1, std::nullopt});
      }
    }
  }
  return {};
}

// Checks one piece of an item that was read into `bytes`.
void CheckBlocks(const LayerIndex& index, const WorkItem& item, size_t first,
                 std::span<const std::byte> bytes, std::vector<Finding>& findings) {
  for (size_t i = 0; i < bytes.size() / kBlockSize; ++i) {
    const auto block = bytes.subspan(i * kBlockSize, kBlockSize);
    const bool sound = item.hash
                           ? index_format::Checksum(block) == index.hashes[*item.hash + first + i]
                           : IsZero(block);
    if (!sound) findings.push_back({item.block + first + i, item.hash.has_value(), {}});
  }
}

void CheckItem(const Fd& pages, const std::string& path, const LayerIndex& index,
               const WorkItem& item, std::span<std::byte> buffer, std::vector<Finding>& findings) {
  for (size_t first = 0; first < item.count; first += kReadBlocks) {
    const size_t count = std::min<size_t>(kReadBlocks, item.count - first);
    const auto bytes = buffer.first(count * kBlockSize);
    const FileOffset at((item.block + first) * kBlockSize);
    if (ReadExactlyAt(pages.get(), bytes, at, path)) {
      CheckBlocks(index, item, first, bytes, findings);
      continue;
    }
    // One sector that cannot be read must not hide the rest.
    for (size_t i = 0; i < count; ++i) {
      const auto one = buffer.first(kBlockSize);
      const auto read = ReadExactlyAt(pages.get(), one, at + Bytes(i * kBlockSize), path);
      if (read) {
        CheckBlocks(index, item, first + i, one, findings);
      } else {
        findings.push_back({item.block + first + i, item.hash.has_value(), read.error().message()});
      }
    }
  }
}

// All items, by several threads; findings ascending by block.
std::vector<Finding> CheckItems(const Fd& pages, const std::string& path, const LayerIndex& index,
                                const std::vector<WorkItem>& items, const VerifyOptions& options) {
  unsigned threads = options.threads;
  if (threads == 0) threads = std::clamp(std::thread::hardware_concurrency(), 1u, kMaxThreads);
  std::vector<std::vector<Finding>> found(threads);
  std::atomic<size_t> next{0};
  std::atomic<uint64_t> done{0};
  std::atomic<unsigned> running{threads};
  const auto work = [&](std::vector<Finding>& findings) {
    std::vector<std::byte> buffer(kReadBlocks * kBlockSize);
    for (size_t i = next++; i < items.size(); i = next++) {
      CheckItem(pages, path, index, items[i], buffer, findings);
      done += items[i].count * kBlockSize;
    }
    --running;
    running.notify_one();
  };
  std::vector<std::thread> pool;
  for (unsigned i = 0; i < threads; ++i) pool.emplace_back(work, std::ref(found[i]));
  while (options.progress && running.load() > 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    options.progress(Bytes(done.load()));
  }
  for (std::thread& thread : pool) thread.join();
  if (options.progress) options.progress(Bytes(done.load()));
  std::vector<Finding> all;
  for (std::vector<Finding>& findings : found)
    all.insert(all.end(), findings.begin(), findings.end());
  std::ranges::sort(all, {}, &Finding::block);
  return all;
}

// Neighbouring findings of one kind become one damage.
void AddFindings(const std::vector<Finding>& findings, const std::string& path,
                 LayerVerdict& verdict) {
  for (size_t i = 0; i < findings.size();) {
    size_t end = i + 1;
    while (end < findings.size() && findings[end].block == findings[end - 1].block + 1 &&
           findings[end].hashed == findings[i].hashed && findings[end].why == findings[i].why) {
      ++end;
    }
    const FileRange range{FileOffset(findings[i].block * kBlockSize),
                          FileOffset((findings[end - 1].block + 1) * kBlockSize)};
    std::string what =
        fmt::format("{}: {} at offset {} ", path, HumanBytes(range.size()), range.begin.value);
    if (!findings[i].why.empty()) {
      what += "cannot be read: " + findings[i].why;
    } else if (!findings[i].hashed) {
      what += "hold data where there was none";
    } else if (end - i == 1) {
      what += "does not match its hash";
    } else {
      what += "do not match their hashes";
    }
    verdict.damages.push_back({path, range, std::move(what), {}});
    for (; i < end; ++i) {
      if (findings[i].hashed) {
        verdict.damaged_blocks.push_back(findings[i].block);
      } else {
        verdict.pages_unsound = true;
      }
    }
  }
}

// Opens the pages file and compares its size; damage of that kind is told with what is lost.
std::optional<Fd> OpenPages(const std::string& path, const LayerIndex& index, uint64_t& size,
                            LayerVerdict& verdict) {
  const auto tell = [&](std::string what, FileRange lost) {
    verdict.pages_unsound = true;
    verdict.damages.push_back({path, lost, std::move(what), {}});
    for (const uint64_t block : index.blocks) {
      if (block * kBlockSize >= lost.begin.value && block * kBlockSize < lost.end.value) {
        verdict.damaged_blocks.push_back(block);
      }
    }
  };
  const FileOffset end(index.header.pages_size);
  auto fd = OpenRegularFile(path);
  if (!fd) {
    tell(fd.error().errnum() == ENOENT ? path + " is missing" : fd.error().message(),
         {FileOffset(0), end});
    return std::nullopt;
  }
  const auto info = StatFd(fd->get(), path);
  if (!info) {
    tell(info.error().message(), {FileOffset(0), end});
    return std::nullopt;
  }
  size = static_cast<uint64_t>(info->st_size);
  if (size < end.value) {
    tell(fmt::format("{} is truncated: it ends at offset {}, not at {}", path, size, end.value),
         {FileOffset(AlignDown(size, kBlockSize)), end});
  } else if (size > end.value) {
    verdict.pages_unsound = true;
    verdict.damages.push_back({path,
                               FileRange{end, FileOffset(size)},
                               fmt::format("{} has bytes too many: it ends at offset {}, not at {}",
                                           path, size, end.value),
                               {}});
  }
  return std::move(*fd);
}

}  // namespace

Result<LayerIndex> ReadLayerIndex(const std::string& path, const ManifestLayer* expected) {
  auto opened = OpenRegularFile(path);
  if (!opened && opened.error().errnum() == ENOENT) return UserError("{} is missing", path);
  if (!opened) return Failure(std::move(opened).error());
  const Fd fd = std::move(*opened);
  UNMOOR_ASSIGN(const struct stat info, StatFd(fd.get(), path));
  const auto size = static_cast<uint64_t>(info.st_size);
  if (size < index_format::kHeaderSize) {
    return UserError("{} is truncated: {} bytes, its header alone has {}", path, size,
                     index_format::kHeaderSize);
  }
  std::vector<std::byte> bytes(index_format::kHeaderSize);
  UNMOOR_TRY(ReadExactlyAt(fd.get(), bytes, FileOffset(0), path));
  LayerIndex index;
  UNMOOR_ASSIGN(index.header, index_format::DecodeHeader(bytes, path));
  const index_format::Header& header = index.header;
  if (size != header.file_bytes()) {
    return UserError("{} {}: it ends at offset {}, not at {}", path,
                     size < header.file_bytes() ? "is truncated" : "has bytes too many", size,
                     header.file_bytes());
  }
  if (expected != nullptr &&
      (header.id != expected->id || header.header_checksum != expected->index_checksum ||
       header.pages_size != expected->pages_size.value ||
       header.data_bytes != expected->data.value)) {
    return UserError(
        "{} is not the index that the manifest means; a file of another checkpoint "
        "was put here",
        path);
  }
  bytes.resize(header.table_bytes());
  UNMOOR_TRY(ReadExactlyAt(fd.get(), bytes, FileOffset(index_format::kHeaderSize), path));
  UNMOOR_ASSIGN(index.tables, index_format::DecodeTables(header, bytes, path));
  bytes.resize(header.hash_count * index_format::kHashSize);
  UNMOOR_TRY(ReadExactlyAt(fd.get(), bytes, FileOffset(header.hash_offset()), path));
  if (index_format::Checksum(bytes) != header.hash_checksum) {
    return UserError("{} is damaged at offset {}: the hashes do not match their checksum", path,
                     header.hash_offset());
  }
  index.hashes = index_format::DecodeHashes(bytes);
  index.blocks.reserve(index.hashes.size());
  index_format::ForEachDataBlock(index.tables.segments,
                                 [&](uint64_t block) { index.blocks.push_back(block); });
  return index;
}

LayerVerdict VerifyLayer(const std::string& dir, const std::string& id,
                         const ManifestLayer* expected, const VerifyOptions& options) {
  LayerVerdict verdict;
  const std::string index_path = LayerIndexPath(dir, id);
  const std::string pages_path = LayerPagesPath(dir, id);
  auto index = ReadLayerIndex(index_path, expected);
  if (!index) {
    verdict.damages.push_back({index_path, std::nullopt, index.error().message(), {}});
    // Without hashes nothing more can be said of the pages than whether they are there.
    if (!Exists(pages_path)) {
      verdict.damages.push_back({pages_path, std::nullopt, pages_path + " is missing", {}});
      verdict.pages_unsound = true;
    }
    return verdict;
  }
  verdict.index = std::move(*index);
  uint64_t size = 0;
  const auto pages = OpenPages(pages_path, *verdict.index, size, verdict);
  if (!pages || !options.pages) return verdict;
  const uint64_t file_blocks = std::min(size, verdict.index->header.pages_size) / kBlockSize;
  std::vector<WorkItem> items;
  AddHashedBlocks(*verdict.index, file_blocks, items);
  for (const WorkItem& item : items) verdict.checked += Bytes(item.count * kBlockSize);
  if (auto added = AddOtherData(*pages, pages_path, *verdict.index, file_blocks, items); !added) {
    verdict.damages.push_back({pages_path, std::nullopt, added.error().message(), {}});
  }
  AddFindings(CheckItems(*pages, pages_path, *verdict.index, items, options), pages_path, verdict);
  std::ranges::sort(verdict.damaged_blocks);
  return verdict;
}

std::vector<DamagePlace> PlacesOf(FileRange bytes, const LayerIndex& index, uint32_t layer,
                                  const Manifest* manifest) {
  std::vector<DamagePlace> places;
  const std::span<const ManifestTask> tasks =
      manifest == nullptr ? std::span<const ManifestTask>() : manifest->tasks;
  const std::vector<Extent>& extents = index.tables.extents;
  auto extent = std::ranges::partition_point(
      extents, [&](const Extent& e) { return e.file_range().end <= bytes.begin; });
  for (; extent != extents.end() && extent->offset < bytes.end; ++extent) {
    const FileRange part = extent->file_range().Intersect(bytes);
    const Vaddr begin = extent->range.begin + (part.begin - extent->offset);
    const VaddrRange addresses{begin, begin + part.size()};
    DamagePlace place{extent->task_vpid, {}, extent->range, {}, addresses};
    const size_t before = places.size();
    for (const ManifestTask& task : tasks) {
      for (const ManifestVma& vma : task.vmas) {
        // Forked tasks share extents; a layer may be there twice.
        const auto uses = [&](uint32_t its_layer, FileOffset offset) {
          return its_layer == layer && FileRange{offset, offset + vma.range.size()}.Overlaps(part);
        };
        if (vma.kind != VmaKind::kMapped || !vma.range.Overlaps(addresses)) continue;
        if (!uses(vma.layer, vma.offset) &&
            std::ranges::none_of(vma.deltas,
                                 [&](const ManifestDelta& d) { return uses(d.layer, d.offset); })) {
          continue;
        }
        places.push_back(
            {task.vpid, task.comm, vma.range, vma.name, vma.range.Intersect(addresses)});
      }
    }
    if (places.size() == before) places.push_back(place);
  }
  return places;
}

}  // namespace unmoor
