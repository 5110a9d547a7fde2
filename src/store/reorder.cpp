// See reorder.h.
#include "store/reorder.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/fault_point.h"
#include "image/directory_lock.h"
#include "image/layer_reader.h"
#include "image/layout.h"
#include "image/pack.h"
#include "image/working_set.h"
#include "os/file.h"
#include "os/storage.h"
#include "store/pending_file.h"

namespace unmoor {
namespace {

constexpr uint64_t kChunk = kHugePageSize;

Bytes SizeOf(const std::vector<FileRange>& ranges) {
  Bytes sum;
  for (const FileRange& range : ranges) sum += range.size();
  return sum;
}

// Adds to `count` only if both are known.
void Add(std::optional<size_t>& sum, const std::optional<size_t>& count) {
  if (sum && count) {
    *sum += *count;
  } else {
    sum.reset();
  }
}

// In how many pieces the ranges, read in their order, lie on the disk.
Result<std::optional<size_t>> CountExtents(int fd, const std::vector<FileRange>& ranges,
                                           const std::string& name) {
  size_t count = 0;
  uint64_t end = 0;
  for (const FileRange& range : ranges) {
    UNMOOR_ASSIGN(const auto extents, ExtentsOf(fd, range, name));
    if (!extents) return std::optional<size_t>();
    for (const StoredExtent& extent : *extents) {
      if (count == 0 || extent.begin != end) ++count;
      end = extent.end;
    }
  }
  return std::optional(count);
}

// The ranges of one layer, in the order in which a restore reads them.
std::vector<FileRange> RangesIn(const WorkingSet& set, const std::string& layer) {
  std::vector<FileRange> ranges;
  for (const WorkingSetRange& range : MergeForReading(set.ranges)) {
    if (set.layers[range.layer] == layer) ranges.push_back(range.range);
  }
  return ranges;
}

Result<WorkingSet> ReadRecordedSet(const std::string& directory, const Manifest& manifest) {
  if (IsPacked(directory, manifest)) {
    return UserError("{0} is packed, so its pages have no order; 'unmoor unpack {0}' first",
                     directory);
  }
  UNMOOR_ASSIGN(auto set, ReadWorkingSet(directory));
  if (!set || set->ranges.empty()) {
    return UserError(
        "{0} has no recorded working set; record one with 'unmoor restore -D {0} -d --record', "
        "then 'unmoor record -t PID --stop'",
        directory);
  }
  UNMOOR_TRY(CheckWorkingSet(*set, manifest, WorkingSetPath(directory)));
  return *std::move(set);
}

class Reorderer {
 public:
  Reorderer(const ReorderOptions& options, ReorderReport& report)
      : options_(options), report_(report) {}

  [[nodiscard]] Result<> Run(const Manifest& manifest, const WorkingSet& set);

 private:
  struct Layer {
    LayerReader reader;
    PageOrder order;
    std::optional<size_t> extents;
  };
  [[nodiscard]] Result<> Look(const ManifestLayer& entry, const std::vector<FileRange>& wanted);
  [[nodiscard]] Result<> WriteAnew(Layer& layer);
  [[nodiscard]] Result<> WritePages(const Layer& layer, const PendingFile& file);
  [[nodiscard]] Result<> Copy(const LayerReader& from, FileRange range, const PendingFile& to);

  const ReorderOptions& options_;
  ReorderReport& report_;
  std::vector<Layer> layers_;  // that can lie better than they do
  std::vector<std::byte> buffer_;
  Bytes done_;
  Bytes total_;
};

Result<> Reorderer::Look(const ManifestLayer& entry, const std::vector<FileRange>& wanted) {
  UNMOOR_ASSIGN(LayerReader reader, LayerReader::Open(report_.directory, entry));
  const FileRange all{FileOffset(0), FileOffset(entry.pages_size.value)};
  UNMOOR_ASSIGN(const std::vector<FileRange> data,
                DataRanges(reader.pages_fd().get(), all, reader.pages_path()));
  PageOrder order = OrderPages(wanted, data);
  if (order.first.empty()) return {};
  UNMOOR_ASSIGN(const auto extents,
                CountExtents(reader.pages_fd().get(), order.first, reader.pages_path()));
  ++report_.layers;
  report_.placed += SizeOf(order.first);
  Add(report_.extents_before, extents);
  if (extents && *extents <= 1) {
    Add(report_.extents_after, extents);
    return {};
  }
  total_ += SizeOf(data);
  layers_.push_back({std::move(reader), std::move(order), extents});
  return {};
}

Result<> Reorderer::Copy(const LayerReader& from, FileRange range, const PendingFile& to) {
  while (!range.empty()) {
    const FileOffset begin(AlignDown(range.begin.value, kBlockSize));
    const FileOffset end(
        std::min(AlignDown(begin.value, kChunk) + kChunk, AlignUp(range.end.value, kBlockSize)));
    buffer_.resize((end - begin).value);
    UNMOOR_TRY(ReadExactlyAt(from.pages_fd().get(), buffer_, begin, from.pages_path()));
    const std::span<const std::byte> bytes(buffer_);
    for (uint64_t at = 0; at < bytes.size(); at += kBlockSize) {
      UNMOOR_TRY(from.CheckBlock(begin + Bytes(at), bytes.subspan(at, kBlockSize)));
    }
    const FileRange part = range.Intersect({begin, end});
    UNMOOR_TRY(WriteExactlyAt(to.fd(), bytes.subspan((part.begin - begin).value, part.size().value),
                              part.begin, to.path()));
    done_ += part.size();
    if (options_.progress) options_.progress(done_, total_);
    range.begin = part.end;
  }
  return {};
}

Result<> Reorderer::WritePages(const Layer& layer, const PendingFile& file) {
  UNMOOR_TRY(Truncate(file.fd(), layer.reader.info().file_size, file.path()));
  // Written back, pages would get a place by their offset. Given one range by range they follow one
  // another, which is what ext4 and xfs do for requests that come one after the other.
  for (const FileRange& range : layer.order.first) {
    UNMOOR_ASSIGN(const bool allocated, Allocate(file.fd(), range, file.path()));
    if (!allocated) break;
  }
  for (const FileRange& range : layer.order.first) UNMOOR_TRY(Copy(layer.reader, range, file));
  UNMOOR_TRY(FaultPoint("reorder.set_written"));
  for (const FileRange& range : layer.order.rest) UNMOOR_TRY(Copy(layer.reader, range, file));
  return file.Sync();
}

Result<> Reorderer::WriteAnew(Layer& layer) {
  UNMOOR_TRY(layer.reader.LoadHashes());
  PendingFile file(layer.reader.pages_path(), kReorderInfix);
  UNMOOR_TRY(file.Create());
  UNMOOR_TRY(WritePages(layer, file));
  UNMOOR_ASSIGN(const auto extents, CountExtents(file.fd(), layer.order.first, file.path()));
  if (extents && layer.extents && *extents >= *layer.extents) {
    Add(report_.extents_after, layer.extents);
    return {};
  }
  UNMOOR_TRY(FaultPoint("reorder.before_rename"));
  UNMOOR_TRY(file.MoveIntoPlace());
  UNMOOR_TRY(FaultPoint("reorder.after_rename"));
  UNMOOR_TRY(SyncPath(LayersDirectory(report_.directory)));
  Add(report_.extents_after, extents);
  ++report_.written_layers;
  report_.written += SizeOf(layer.order.first) + SizeOf(layer.order.rest);
  return {};
}

Result<> Reorderer::Run(const Manifest& manifest, const WorkingSet& set) {
  report_.working_set = set.size();
  report_.extents_before = 0;
  report_.extents_after = 0;
  for (const ManifestLayer& entry : manifest.layers) {
    const std::vector<FileRange> wanted = RangesIn(set, entry.id);
    if (!wanted.empty()) UNMOOR_TRY(Look(entry, wanted));
  }
  if (options_.dry_run) {
    report_.extents_after.reset();
    report_.written_layers = layers_.size();
    report_.written = total_;
    return {};
  }
  for (Layer& layer : layers_) UNMOOR_TRY(WriteAnew(layer));
  return {};
}

// Moves what of `data` lies in `range` to the end of `out`.
void Take(std::map<FileOffset, FileOffset>& data, FileRange range, std::vector<FileRange>& out) {
  auto it = data.upper_bound(range.begin);
  if (it != data.begin() && std::prev(it)->second > range.begin) --it;
  while (it != data.end() && it->first < range.end) {
    const FileRange piece{it->first, it->second};
    const FileRange part = piece.Intersect(range);
    it = data.erase(it);
    if (piece.begin < part.begin) data[piece.begin] = part.begin;
    if (part.end < piece.end) data[part.end] = piece.end;
    if (!out.empty() && out.back().end == part.begin) {
      out.back().end = part.end;
    } else {
      out.push_back(part);
    }
  }
}

}  // namespace

PageOrder OrderPages(const std::vector<FileRange>& wanted, const std::vector<FileRange>& data) {
  std::map<FileOffset, FileOffset> left;
  for (const FileRange& range : data) left[range.begin] = range.end;
  PageOrder order;
  for (const FileRange& range : wanted) Take(left, range, order.first);
  for (const auto& [begin, end] : left) order.rest.push_back({begin, end});
  return order;
}

Result<ReorderReport> Reorder(const ReorderOptions& options) {
  UNMOOR_TRY(ReadManifest(options.directory));  // says what it is, if it is none
  UNMOOR_ASSIGN(
      const DirectoryLock lock,
      DirectoryLock::Take(options.directory, options.dry_run ? LockUse::kRead : LockUse::kWrite));
  UNMOOR_ASSIGN(const Manifest manifest, ReadManifest(options.directory));
  ReorderReport report;
  UNMOOR_ASSIGN(report.directory, RealPath(options.directory));
  if (!options.dry_run) RemovePending(LayersDirectory(report.directory), kReorderInfix);
  UNMOOR_ASSIGN(const WorkingSet set, ReadRecordedSet(report.directory, manifest));
  UNMOOR_TRY(Reorderer(options, report).Run(manifest, set));
  return report;
}

}  // namespace unmoor
