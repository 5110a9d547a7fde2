// See plan.h.
#include "remap/plan.h"

#include <algorithm>

namespace unmoor {
namespace {

// Without flags that only say what a VMA is backed by, not how the program wants it.
template <typename Other>
bool WantsTheSame(const VmaInfo& vma, const Other& other) {
  for (const std::string_view flag : {"hg", "nh", "dd", "dc", "mg", "sr", "rr", "lo", "nr"}) {
    if (vma.HasFlag(flag) != other.HasFlag(flag)) return false;
  }
  return vma.prot == other.prot;
}

}  // namespace

bool SameWish(const VmaInfo& a, const VmaInfo& b) {
  return WantsTheSame(a, b);
}

bool Area::HasFlag(std::string_view flag) const {
  return std::ranges::find(vm_flags, flag) != vm_flags.end();
}

std::vector<Area> FindAreas(std::span<const VmaInfo> vmas,
                            const std::function<bool(const VmaInfo&)>& is_image,
                            const RangeSet& dropped) {
  std::vector<Area> areas;
  bool open = false;  // the last area may still grow
  for (const VmaInfo& vma : vmas) {
    const bool image = is_image(vma);
    const bool given_back =
        !image && vma.IsPrivateAnonymous() && dropped.SizeWithin(vma.range) == vma.range.size();
    if (!image && !given_back) {
      open = false;
      continue;
    }
    const bool joins =
        open && areas.back().range.end == vma.range.begin && WantsTheSame(vma, areas.back());
    if (joins && given_back) {
      areas.back().range.end = vma.range.end;
      continue;
    }
    if (joins && areas.back().inode == 0) {
      Area& area = areas.back();  // began with a dropped piece: now its file is known
      area.inode = vma.inode;
      area.dev_major = vma.dev_major;
      area.dev_minor = vma.dev_minor;
      area.file_vma = vma.range;
      area.offset = vma.offset.value - area.range.size().value;
      area.range.end = vma.range.end;
      continue;
    }
    if (joins && areas.back().inode == vma.inode &&
        areas.back().OffsetOf(vma.range.begin) == vma.offset) {
      areas.back().range.end = vma.range.end;
      continue;
    }
    Area area;
    area.range = vma.range;
    area.prot = vma.prot;
    area.vm_flags = vma.vm_flags;
    if (image) {
      area.inode = vma.inode;
      area.dev_major = vma.dev_major;
      area.dev_minor = vma.dev_minor;
      area.file_vma = vma.range;
      area.offset = vma.offset.value;
    }
    areas.push_back(std::move(area));
    open = true;
  }
  std::erase_if(areas, [](const Area& area) { return area.inode == 0; });
  return areas;
}

std::vector<VaddrRange> CutIntoBlocks(VaddrRange range) {
  std::vector<VaddrRange> blocks;
  for (Vaddr at = range.begin; at < range.end;) {
    const Vaddr end =
        std::min(range.end, Vaddr(AlignDown(at.value, kHugePageSize) + kHugePageSize));
    blocks.push_back({at, end});
    at = end;
  }
  return blocks;
}

Bytes BlockContent::size() const {
  Bytes total;
  for (const VaddrRange r : image) total += r.size();
  for (const VaddrRange r : own) total += r.size();
  return total;
}

bool BlockContent::IsFullBlock(VaddrRange block) const {
  return block.size().value == kHugePageSize && block.begin.value % kHugePageSize == 0 &&
         size() == block.size();
}

BlockContent ContentOf(VaddrRange block, const RangeSet& image_data, const RangeSet& own,
                       const RangeSet& dropped) {
  BlockContent content;
  content.own = own.Inside(block);
  for (const VaddrRange data : image_data.Inside(block)) {
    for (const VaddrRange kept : dropped.Outside(data)) {
      for (const VaddrRange part : own.Outside(kept)) content.image.push_back(part);
    }
  }
  return content;
}

PageCount Pacer::dirty_limit() const {
  // Copying a page that is in no cache takes about half a microsecond; an eighth of the pause for
  // it.
  const auto pages = static_cast<uint64_t>(max_pause_.value / 4000);
  return PageCount(std::max<uint64_t>(pages, kHugePageSize / kPageSize));
}

Bytes Pacer::freed_limit() const {
  // To free a page takes 0.3 to 0.7 microseconds; half of the pause for it.
  const auto pages = static_cast<uint64_t>(max_pause_.value / 1200);
  return Bytes(std::max<uint64_t>(pages * kPageSize, kHugePageSize));
}

void Pacer::Swapped(Nanos pause) {
  if (pause > max_pause_) {
    size_ = Bytes(std::max(size_.value / 2, kHugePageSize));
  } else if (pause.value < max_pause_.value / 2) {
    size_ = Bytes(std::min(size_.value + size_.value / 2, most_.value));
  }
}

void Pacer::TooDirty() {
  size_ = Bytes(std::max(size_.value / 2, kHugePageSize));
}

}  // namespace unmoor
