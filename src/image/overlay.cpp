// See overlay.h.
#include "image/overlay.h"

#include <algorithm>

namespace unmoor {
namespace {

OverlayRun Part(const OverlayRun& run, VaddrRange range) {
  return {range, run.layer, run.offset + (range.begin - run.range.begin)};
}

// `above` over `below`; both ascending and apart.
std::vector<OverlayRun> Cover(const std::vector<OverlayRun>& below,
                              const std::vector<OverlayRun>& above) {
  std::vector<OverlayRun> result;
  result.reserve(below.size() + above.size());
  auto top = above.begin();
  for (const OverlayRun& run : below) {
    Vaddr at = run.range.begin;
    while (at < run.range.end) {
      while (top != above.end() && top->range.end <= at) result.push_back(*top++);
      const Vaddr next =
          top == above.end() ? run.range.end : std::min(top->range.begin, run.range.end);
      if (at < next) result.push_back(Part(run, {at, next}));
      // Whatever `top` covers of this run is hidden; it is appended once the runs are past it.
      at = top == above.end() || next == run.range.end ? run.range.end : top->range.end;
    }
  }
  result.insert(result.end(), top, above.end());
  return result;
}

Bytes Sum(const std::vector<OverlayRun>& runs) {
  Bytes sum;
  for (const OverlayRun& run : runs) sum += run.range.size();
  return sum;
}

}  // namespace

Overlay::Overlay(std::span<const LayerInfo* const> layers, std::string directory)
    : layers_(layers.begin(), layers.end()), directory_(std::move(directory)) {}

const Extent* Overlay::FindExtent(VaddrRange range, uint32_t layer, FileOffset offset) const {
  if (layer >= layers_.size()) return nullptr;
  const std::vector<Extent>& all = layers_[layer]->extents;
  const auto found = std::ranges::partition_point(
      all, [&](const Extent& e) { return e.file_range().end <= offset; });
  const FileOffset end = offset + range.size();
  if (found == all.end() || found->offset >= end) return nullptr;
  if (std::next(found) != all.end() && std::next(found)->offset < end) return nullptr;
  // Both differences wrap alike where the extent begins above the range.
  if (found->offset - offset != found->range.begin - range.begin) return nullptr;
  return &*found;
}

Result<std::vector<OverlayRun>> Overlay::Segments(uint32_t vpid, VaddrRange range, uint32_t layer,
                                                  FileOffset offset) const {
  if (FindExtent(range, layer, offset) == nullptr) {
    return UserError(
        "{}: manifest and index of layer {} differ about {} of task {}; the directory is damaged, "
        "restore it from a copy",
        directory_, layer < layers_.size() ? layers_[layer]->id : "?", range, vpid);
  }
  const std::vector<Segment>& all = layers_[layer]->segments;
  auto segment = std::ranges::partition_point(
      all, [&](const Segment& s) { return s.file_range().end <= offset; });
  std::vector<OverlayRun> runs;
  for (; segment != all.end() && segment->offset < offset + range.size(); ++segment) {
    const VaddrRange part = segment->range.Intersect(range);
    runs.push_back({part, layer, offset + (part.begin - range.begin)});
  }
  return runs;
}

bool Overlay::GrowsIntoZeros(const ManifestVma& vma) const {
  const Extent* const extent = FindExtent(vma.range, vma.layer, vma.offset);
  if (extent == nullptr) return false;
  const LayerInfo& layer = *layers_[vma.layer];
  const FileOffset end = vma.offset + vma.range.size();
  const Extent* const last = &layer.extents.back();
  const FileOffset next = extent == last ? FileOffset(layer.file_size.value) : (extent + 1)->offset;
  if (next < end || next - end < Bytes(kHugePageSize)) return false;
  const auto segment = std::ranges::partition_point(
      layer.segments, [&](const Segment& s) { return s.file_range().end <= end; });
  return segment == layer.segments.end() || segment->offset >= next;
}

std::optional<ManifestVma> Overlay::Reach(const ManifestVma& vma, VaddrRange range) const {
  ManifestVma reached = vma;
  reached.range = range;
  // Wraps below zero where there is no room; FindExtent then finds nothing.
  const Bytes distance = range.begin - vma.range.begin;
  const auto move = [&](uint32_t layer, FileOffset& offset) {
    offset = offset + distance;
    const uint64_t size = layers_[layer]->file_size.value;
    return offset.value <= size && range.size().value <= size - offset.value &&
           FindExtent(range, layer, offset) != nullptr;
  };
  bool fits = move(reached.layer, reached.offset);
  for (ManifestDelta& delta : reached.deltas) fits = fits && move(delta.layer, delta.offset);
  if (!fits || !GrowsIntoZeros(reached)) return std::nullopt;
  return reached;
}

Result<VmaPages> Overlay::Resolve(uint32_t vpid, const ManifestVma& vma) const {
  VmaPages pages;
  UNMOOR_ASSIGN(pages.all, Segments(vpid, vma.range, vma.layer, vma.offset));
  for (const ManifestDelta& delta : vma.deltas) {
    UNMOOR_ASSIGN(const std::vector<OverlayRun> above,
                  Segments(vpid, vma.range, delta.layer, delta.offset));
    pages.deltas = Cover(pages.deltas, above);
  }
  if (!pages.deltas.empty()) pages.all = Cover(pages.all, pages.deltas);
  pages.data = Sum(pages.all);
  return pages;
}

}  // namespace unmoor
