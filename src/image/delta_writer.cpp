// See delta_writer.h.
#include "image/delta_writer.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/zero.h"
#include "image/layout.h"
#include "os/file.h"

namespace unmoor {
namespace {

constexpr size_t kChunk = size_t{1} << 20;
// CRIU copies a delta's pages at restore, so a VMA that has more of them than this share, and more
// than `kCheap`, is written in full again.
constexpr uint64_t kDeltaShare = 4;
constexpr Bytes kCheap(uint64_t{16} << 20);

std::map<std::pair<uint32_t, Vaddr>, Extent> ExtentsOf(const LayerInfo& layer) {
  std::map<std::pair<uint32_t, Vaddr>, Extent> extents;
  for (const Extent& extent : layer.extents) {
    extents.emplace(std::pair{extent.task_vpid, extent.range.begin}, extent);
  }
  return extents;
}

std::vector<const LayerInfo*> InfosOf(std::span<const LayerReader> layers, const LayerInfo& own) {
  std::vector<const LayerInfo*> infos;
  for (const LayerReader& layer : layers) infos.push_back(&layer.info());
  infos.push_back(&own);
  return infos;
}

ManifestLayer EntryOf(const LayerInfo& layer) {
  return {layer.id, layer.file_size, layer.data_bytes, layer.allocated, layer.index_checksum};
}

}  // namespace

bool IsWorthwhile(const LayerBase& base, Bytes data) {
  if (base.vma.deltas.size() >= kMaxDeltas) return false;
  const Bytes allowed = std::max(kCheap, Bytes(data.value / kDeltaShare));
  Bytes deltas;
  for (const OverlayRun& run : base.pages.deltas) deltas += run.range.size();
  if (deltas > allowed) return false;
  // At least so many pages are new, or have vanished and would come back as pages of zeros.
  const Bytes shown = base.pages.data;
  return (shown > data ? shown - data : data - shown) <= allowed;
}

DeltaWriter::DeltaWriter(std::string layers_directory, std::string layer_id,
                         std::span<const LayerReader> layers, bool shares, WriteBack write_back)
    : directory_(std::move(layers_directory)),
      id_(std::move(layer_id)),
      layers_(layers),
      shares_(shares),
      write_back_(write_back) {}

Result<> DeltaWriter::AddTask(uint32_t vpid, std::vector<DeltaVma> vmas) {
  if (!vmas.empty()) {
    if (!writer_) {
      UNMOOR_ASSIGN(writer_, LayerWriter::Create(directory_, id_, write_back_,
                                                 compares() ? ZeroPages::kKeep : ZeroPages::kHole));
    }
    std::vector<VaddrRange> ranges;
    for (const DeltaVma& vma : vmas) ranges.push_back(vma.range);
    UNMOOR_TRY(writer_->AddTask(vpid, ranges));
  }
  vmas_[vpid] = std::move(vmas);
  return {};
}

Result<> DeltaWriter::Write(uint32_t vpid, Vaddr at, std::span<const std::byte> pages) {
  if (complete_.contains(vpid)) {
    return MachineError("pages of task {} came after another task's had begun", vpid);
  }
  UNMOOR_TRY(Settle(vpid, at));
  const auto& vmas = vmas_.at(vpid);
  const auto vma =
      std::ranges::partition_point(vmas, [&](const DeltaVma& v) { return v.range.end <= at; });
  UNMOOR_CHECK(vma != vmas.end() && vma->range.Contains({at, at + Bytes(pages.size())}));
  UNMOOR_TRY(WriteDifferences(vpid, *vma, at, pages));
  settled_[vpid] = at + Bytes(pages.size());
  return {};
}

// Without bases nothing has to be hidden.
Result<std::span<std::byte>> DeltaWriter::Room(uint32_t vpid, Vaddr at, Bytes want) {
  if (compares() || !writer_) return std::span<std::byte>();
  return writer_->Reserve(vpid, at, want);
}

Result<> DeltaWriter::Filled(uint32_t vpid, Vaddr at, Bytes size) {
  UNMOOR_TRY(writer_->Commit(size));
  settled_[vpid] = at + size;
  return {};
}

// Where something may be hidden, zeros count as pages in the layer: those that hide nothing must
// not get there.
Result<> DeltaWriter::WriteDifferences(uint32_t vpid, const DeltaVma& vma, Vaddr at,
                                       std::span<const std::byte> pages) {
  if (!compares()) return writer_->Write(vpid, at, pages);
  base_bytes_.resize(kChunk);
  while (!pages.empty()) {
    const auto part = pages.first(std::min(pages.size(), kChunk));
    const auto old = std::span(base_bytes_).first(part.size());
    if (vma.base) UNMOOR_TRY(Read(*vma.base, {at, at + Bytes(part.size())}, old));
    const auto same = [&](size_t i) {
      return vma.base ? std::memcmp(&part[i], &old[i], kPageSize) == 0
                      : IsZero(part.subspan(i, kPageSize));
    };
    for (size_t i = 0; i < part.size();) {
      const bool skip = same(i);
      size_t end = i + kPageSize;
      while (end < part.size() && same(end) == skip) end += kPageSize;
      if (!skip) UNMOOR_TRY(writer_->Write(vpid, at + Bytes(i), part.subspan(i, end - i)));
      i = end;
    }
    pages = pages.subspan(part.size());
    at = at + Bytes(part.size());
  }
  return {};
}

Result<> DeltaWriter::Settle(uint32_t vpid, Vaddr end) {
  Vaddr& settled = settled_[vpid];
  const auto& vmas = vmas_.at(vpid);
  auto vma =
      std::ranges::partition_point(vmas, [&](const DeltaVma& v) { return v.range.end <= settled; });
  for (; vma != vmas.end() && vma->range.begin < end; ++vma) {
    const VaddrRange part = vma->range.Intersect({settled, end});
    Vaddr at = part.begin;
    for (const LayerPiece& piece : vma->pieces) {
      const VaddrRange mapped = piece.range.Intersect(part);
      if (mapped.empty()) continue;
      UNMOOR_TRY(HideVanished(vpid, *vma, {at, mapped.begin}));
      UNMOOR_TRY(WriteMapped(vpid, *vma, piece, mapped));
      at = mapped.end;
    }
    UNMOOR_TRY(HideVanished(vpid, *vma, {at, part.end}));
  }
  settled = std::max(settled, end);
  return {};
}

Result<> DeltaWriter::HideVanished(uint32_t vpid, const DeltaVma& vma, VaddrRange range) {
  static const std::vector<std::byte> zeros(kChunk);
  if (!vma.base) return {};
  const auto& runs = vma.base->pages.all;
  auto run = std::ranges::partition_point(
      runs, [&](const OverlayRun& r) { return r.range.end <= range.begin; });
  for (; run != runs.end() && run->range.begin < range.end; ++run) {
    const VaddrRange hidden = run->range.Intersect(range);
    for (Vaddr at = hidden.begin; at < hidden.end;) {
      const uint64_t size = std::min<uint64_t>((hidden.end - at).value, kChunk);
      UNMOOR_TRY(WriteDifferences(vpid, vma, at, std::span(zeros).first(size)));
      at = at + Bytes(size);
    }
  }
  return {};
}

// Where the VMA stands on the layer it maps, that shows through but for the base's deltas.
Result<> DeltaWriter::WriteMapped(uint32_t vpid, const DeltaVma& vma, const LayerPiece& piece,
                                  VaddrRange range) {
  if (!vma.base) return CopyMapped(vpid, vma, piece, range);
  const auto& runs = vma.base->pages.deltas;
  auto run = std::ranges::partition_point(
      runs, [&](const OverlayRun& r) { return r.range.end <= range.begin; });
  for (; run != runs.end() && run->range.begin < range.end; ++run) {
    UNMOOR_TRY(CopyMapped(vpid, vma, piece, run->range.Intersect(range)));
  }
  return {};
}

Result<> DeltaWriter::CopyMapped(uint32_t vpid, const DeltaVma& vma, const LayerPiece& piece,
                                 VaddrRange range) {
  const LayerReader& layer = layers_[piece.layer];
  const auto offset = [&](Vaddr at) { return piece.offset + (at - piece.range.begin); };
  std::vector<FileRange> parts = {{offset(range.begin), offset(range.end)}};
  // Compared with zeros, holes need not be read.
  if (!vma.base) {
    UNMOOR_ASSIGN(parts, DataRanges(layer.pages_fd().get(), parts.front(), layer.pages_path()));
  }
  mapped_bytes_.resize(kChunk);
  for (const FileRange& part : parts) {
    for (FileOffset at = part.begin; at < part.end;) {
      const auto data =
          std::span(mapped_bytes_).first(std::min<uint64_t>((part.end - at).value, kChunk));
      UNMOOR_TRY(ReadExactlyAt(layer.pages_fd().get(), data, at, layer.pages_path()));
      UNMOOR_TRY(WriteDifferences(vpid, vma, piece.range.begin + (at - piece.offset), data));
      at = at + Bytes(data.size());
    }
  }
  return {};
}

ManifestVma DeltaWriter::PlaceOf(const DeltaVma& vma, const Extent& extent) const {
  ManifestVma place;
  if (!vma.base) {
    place.layer = own();
    place.offset = extent.offset;
  } else {
    place = vma.base->vma;
    if (extent.data > Bytes(0)) place.deltas.push_back({own(), extent.offset});
  }
  place.range = vma.range;
  place.kind = VmaKind::kMapped;
  return place;
}

Result<std::optional<LayerBase>> DeltaWriter::FindShared(uint32_t owner, VaddrRange range) {
  UNMOOR_CHECK(shares_);
  std::optional<LayerBase> none;
  const auto task = vmas_.find(owner);
  if (task == vmas_.end()) return none;
  const DeltaVma* best = nullptr;
  auto vma = std::ranges::partition_point(
      task->second, [&](const DeltaVma& v) { return v.range.end <= range.begin; });
  for (; vma != task->second.end() && vma->range.begin < range.end; ++vma) {
    const Bytes common = vma->range.Intersect(range).size();
    if (best == nullptr || common > best->range.Intersect(range).size()) best = &*vma;
  }
  if (best == nullptr) return none;
  if (!complete_.contains(owner)) {
    for (const auto& [vpid, vmas] : vmas_) {
      UNMOOR_TRY(Settle(vpid, Vaddr(kAddressLimit)));
      complete_.insert(vpid);
    }
    UNMOOR_ASSIGN(written_, writer_->Snapshot());
    extents_ = ExtentsOf(written_);
    overlay_.emplace(InfosOf(layers_, written_), directory_);
  }
  const ManifestVma place = PlaceOf(*best, extents_.at({owner, best->range.begin}));
  const auto reached = overlay_->Reach(place, range);
  if (!reached) return none;
  UNMOOR_ASSIGN(VmaPages pages, overlay_->Resolve(owner, *reached));
  return std::optional(LayerBase{*reached, std::move(pages)});
}

double DeltaWriter::SampleChanged(const LayerBase& base, const PageSource& now) const {
  constexpr uint64_t kSamples = 128;
  if (base.pages.all.empty()) return 0;
  uint64_t changed = 0;
  auto run = base.pages.all.begin();
  uint64_t before = 0;  // bytes in the runs before `run`
  for (uint64_t i = 0; i < kSamples; ++i) {
    const uint64_t at = AlignDown(base.pages.data.value / kSamples * i, kPageSize);
    while (at - before >= run->range.size().value) before += (run++)->range.size().value;
    const Vaddr page = run->range.begin + Bytes(at - before);
    std::array<std::byte, kPageSize> fresh;
    std::array<std::byte, kPageSize> old;
    if (!now(page, fresh) || !Read(base, {page, page + Bytes(kPageSize)}, old)) return 0;
    if (fresh != old) ++changed;
  }
  return static_cast<double>(changed) / kSamples;
}

bool DeltaWriter::IsMostlyShared(const LayerBase& base, Bytes data, const PageSource& now) const {
  constexpr double kMostDiffering = 1.0 / kDeltaShare;
  return base.pages.data > Bytes(0) && IsWorthwhile(base, data) &&
         SampleChanged(base, now) <= kMostDiffering;
}

Result<> DeltaWriter::Read(const LayerBase& base, VaddrRange range, std::span<std::byte> to) const {
  std::memset(to.data(), 0, to.size());
  const auto& runs = base.pages.all;
  auto run = std::ranges::partition_point(
      runs, [&](const OverlayRun& r) { return r.range.end <= range.begin; });
  for (; run != runs.end() && run->range.begin < range.end; ++run) {
    const VaddrRange part = run->range.Intersect(range);
    const bool ours = run->layer == own();
    UNMOOR_TRY(ReadExactlyAt(ours ? writer_->pages_fd() : layers_[run->layer].pages_fd().get(),
                             to.subspan((part.begin - range.begin).value, part.size().value),
                             run->offset + (part.begin - run->range.begin),
                             ours ? id_ : layers_[run->layer].pages_path()));
  }
  return {};
}

Result<std::optional<LayerInfo>> DeltaWriter::Finish(bool sync) {
  if (!writer_) return std::optional<LayerInfo>();
  for (const auto& [vpid, vmas] : vmas_) UNMOOR_TRY(Settle(vpid, Vaddr(kAddressLimit)));
  UNMOOR_ASSIGN(LayerInfo info, writer_->Finish(sync));
  return std::optional<LayerInfo>(std::move(info));
}

Result<> DeltaWriter::Describe(Manifest& manifest, const LayerInfo& fresh,
                               const std::string& directory) const {
  const std::vector<const LayerInfo*> infos = InfosOf(layers_, fresh);
  const Overlay overlay(infos, directory);
  const auto extents = ExtentsOf(fresh);
  std::map<uint32_t, uint32_t> numbers;  // ours -> the manifest's
  const auto renumber = [&](uint32_t& layer) {
    const auto [known, first] =
        numbers.try_emplace(layer, static_cast<uint32_t>(manifest.layers.size()));
    if (first) manifest.layers.push_back(EntryOf(*infos[layer]));
    layer = known->second;
  };
  for (ManifestTask& task : manifest.tasks) {
    const auto written = vmas_.find(task.vpid);
    if (written == vmas_.end()) continue;
    for (ManifestVma& vma : task.vmas) {
      if (vma.kind != VmaKind::kMapped) continue;
      const auto known = std::ranges::lower_bound(written->second, vma.range, {}, &DeltaVma::range);
      UNMOOR_CHECK(known != written->second.end() && known->range == vma.range);
      const ManifestVma place = PlaceOf(*known, extents.at({task.vpid, vma.range.begin}));
      vma.layer = place.layer;
      vma.offset = place.offset;
      vma.deltas = place.deltas;
      UNMOOR_ASSIGN(const VmaPages pages, overlay.Resolve(task.vpid, vma));
      vma.data = pages.data;  // zero pages became holes
      renumber(vma.layer);
      for (ManifestDelta& delta : vma.deltas) renumber(delta.layer);
    }
  }
  return {};
}

}  // namespace unmoor
