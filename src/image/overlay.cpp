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
    : layers_(layers.begin(), layers.end()),
      extents_(layers.size()),
      directory_(std::move(directory)) {
  for (size_t i = 0; i < layers.size(); ++i) {
    for (const Extent& extent : layers[i]->extents) {
      extents_[i].emplace(std::pair{extent.task_vpid, extent.range.begin}, &extent);
    }
  }
}

Result<std::vector<OverlayRun>> Overlay::Segments(uint32_t vpid, VaddrRange range, uint32_t layer,
                                                  FileOffset offset) const {
  const auto after = extents_[layer].upper_bound({vpid, range.begin});
  const Extent* const extent =
      after == extents_[layer].begin() ? nullptr : std::prev(after)->second;
  if (extent == nullptr || extent->task_vpid != vpid || !extent->range.Contains(range) ||
      extent->offset + (range.begin - extent->range.begin) != offset) {
    return UserError(
        "{}: manifest and index of layer {} differ about {} of task {}; the directory is damaged, "
        "restore it from a copy",
        directory_, layers_[layer]->id, range, vpid);
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
