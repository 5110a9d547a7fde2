// See layer_draft.h.
#include "image/layer_draft.h"

#include <fcntl.h>

#include <algorithm>
#include <cstring>

#include "base/fault_point.h"
#include "base/zero.h"
#include "image/index_writer.h"
#include "os/file.h"

namespace unmoor {
namespace {

constexpr size_t kChunk = kHugePageSize;

}  // namespace

Result<LayerDraft> LayerDraft::Create(const std::string& directory, const std::string& id) {
  UNMOOR_CHECK(IsValidId(id));
  LayerDraft draft;
  draft.id_ = id;
  const std::string stem = directory + "/" + id;
  draft.pages_path_ = fmt::format("{}{}", stem, kPagesSuffix);
  draft.index_path_ = fmt::format("{}{}", stem, kIndexSuffix);
  UNMOOR_ASSIGN(draft.pages_, OpenFile(draft.pages_path_, O_RDWR | O_CREAT | O_EXCL, 0600));
  UNMOOR_ASSIGN(draft.index_, OpenFile(draft.index_path_, O_WRONLY | O_CREAT | O_EXCL, 0600));
  return draft;
}

Result<> LayerDraft::AddVma(uint32_t task_vpid, VaddrRange vma) {
  if (places_.size() == kMaxExtents) {
    return MachineError("more than {} VMAs do not fit in a layer", kMaxExtents);
  }
  Place place;
  UNMOOR_ASSIGN(const FileOffset offset, layout_.Allocate(vma));
  place.extent = {task_vpid, vma, offset, Bytes(0)};
  place.held.resize(vma.size().value / kPageSize);
  UNMOOR_TRY(Truncate(pages_.get(), layout_.file_size(), pages_path_));
  places_.emplace(std::pair{task_vpid, vma.end}, std::move(place));
  return {};
}

Result<LayerDraft::Place*> LayerDraft::Find(uint32_t task_vpid, VaddrRange range) {
  const auto found = places_.upper_bound({task_vpid, range.begin});
  if (found == places_.end() || found->first.first != task_vpid ||
      !found->second.extent.range.Contains(range)) {
    return MachineError("task {}: {} lies in no VMA of the layer", task_vpid, range);
  }
  return &found->second;
}

Result<Bytes> LayerDraft::Show(uint32_t task_vpid, Vaddr at, std::span<const std::byte> pages) {
  UNMOOR_ASSIGN(Place * place, Find(task_vpid, {at, at + Bytes(pages.size())}));
  Bytes written;
  while (!pages.empty()) {
    const auto part = pages.first(std::min(pages.size(), kChunk));
    const size_t first = (at - place->extent.range.begin).value / kPageSize;
    const size_t count = part.size() / kPageSize;
    const auto begin = place->held.begin() + static_cast<ptrdiff_t>(first);
    const bool compare = std::find(begin, begin + static_cast<ptrdiff_t>(count), true) !=
                         begin + static_cast<ptrdiff_t>(count);
    if (compare) {
      shown_.resize(kChunk);
      UNMOOR_TRY(ReadExactlyAt(pages_.get(), std::span(shown_).first(part.size()),
                               place->extent.offset + Bytes(first * kPageSize), pages_path_));
    }
    const auto same = [&](size_t i) {
      const auto page = part.subspan(i * kPageSize, kPageSize);
      if (!place->held[first + i]) return IsZero(page);
      return std::memcmp(page.data(), &shown_[i * kPageSize], kPageSize) == 0;
    };
    for (size_t i = 0; i < count;) {
      const bool skip = same(i);
      size_t end = i + 1;
      while (end < count && same(end) == skip) ++end;
      if (!skip) {
        const auto run = part.subspan(i * kPageSize, (end - i) * kPageSize);
        UNMOOR_TRY(WriteRun(*place, first + i, run));
        written += Bytes(run.size());
      }
      i = end;
    }
    pages = pages.subspan(part.size());
    at = at + Bytes(part.size());
  }
  return written;
}

Result<> LayerDraft::WriteRun(Place& place, size_t page, std::span<const std::byte> pages) {
  UNMOOR_TRY(FaultPoint("layer.write"));
  UNMOOR_TRY(WriteExactlyAt(pages_.get(), pages, place.extent.offset + Bytes(page * kPageSize),
                            pages_path_));
  for (size_t i = 0; i < pages.size() / kPageSize; ++i) {
    place.held[page + i] = !IsZero(pages.subspan(i * kPageSize, kPageSize));
  }
  return {};
}

Result<Bytes> LayerDraft::ShowZeros(uint32_t task_vpid, VaddrRange range) {
  static const std::vector<std::byte> zeros(kPageSize);
  if (range.empty()) return Bytes(0);
  UNMOOR_ASSIGN(Place * place, Find(task_vpid, range));
  const size_t end = (range.end - place->extent.range.begin).value / kPageSize;
  Bytes written;
  for (size_t i = (range.begin - place->extent.range.begin).value / kPageSize; i < end; ++i) {
    if (!place->held[i]) continue;
    UNMOOR_TRY(WriteRun(*place, i, zeros));
    written += Bytes(kPageSize);
  }
  return written;
}

void LayerDraft::CollectTables(LayerInfo& info) const {
  for (const auto& [key, place] : places_) info.extents.push_back(place.extent);
  std::ranges::sort(info.extents, {}, &Extent::offset);
  for (Extent& extent : info.extents) {
    const std::vector<bool>& held = places_.at({extent.task_vpid, extent.range.end}).held;
    for (size_t i = 0; i < held.size();) {
      if (!held[i]) {
        ++i;
        continue;
      }
      size_t end = i + 1;
      while (end < held.size() && held[end]) ++end;
      const Bytes begin(i * kPageSize);
      const Bytes size((end - i) * kPageSize);
      info.segments.push_back({extent.task_vpid,
                               {extent.range.begin + begin, extent.range.begin + begin + size},
                               extent.offset + begin});
      extent.data += size;
      i = end;
    }
    info.data_bytes += extent.data;
  }
}

Result<> LayerDraft::Sync() {
  return SyncFd(pages_.get(), pages_path_);
}

Result<LayerInfo> LayerDraft::Finish() {
  StartWriteback(pages_.get(), FileOffset(0), layout_.file_size());
  LayerInfo info;
  info.id = id_;
  info.file_size = layout_.file_size();
  CollectTables(info);
  UNMOOR_TRY(FinishLayer({pages_.get(), pages_path_, index_.get(), index_path_}, true, info));
  return info;
}

}  // namespace unmoor
