// The remap plan, purely: which parts of a process are direct-mapped, and what of each 2 MiB block
// has to be copied from where. No system calls; tested and printed as a value.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/units.h"
#include "os/procfs.h"
#include "remap/range_set.h"

namespace unmoor {

// A run of addresses that is one VMA in the program's eyes: private mappings of one page image with
// one distance between address and file offset, and pieces of it that the program gave back
// (MADV_DONTNEED) and that are anonymous already.
struct Area {
  VaddrRange range;
  int prot = 0;
  std::vector<std::string> vm_flags;
  uint64_t inode = 0;
  uint32_t dev_major = 0;
  uint32_t dev_minor = 0;
  VaddrRange file_vma;  // one of its file-backed VMAs: /proc/PID/map_files has it by this range
  uint64_t offset = 0;  // file offset of range.begin; wraps below zero where the run starts dropped

  [[nodiscard]] FileOffset OffsetOf(Vaddr at) const {
    return FileOffset(offset + (at - range.begin).value);
  }
  [[nodiscard]] bool HasFlag(std::string_view flag) const;
};

// Whether the program wants both alike: protection and advice, whatever backs them.
[[nodiscard]] bool SameWish(const VmaInfo& a, const VmaInfo& b);

// `vmas` in address order, as from smaps. `is_image` says whether a VMA maps a page image.
[[nodiscard]] std::vector<Area> FindAreas(std::span<const VmaInfo> vmas,
                                          const std::function<bool(const VmaInfo&)>& is_image,
                                          const RangeSet& dropped);

// The blocks of `range`, cut at multiples of 2 MiB.
[[nodiscard]] std::vector<VaddrRange> CutIntoBlocks(VaddrRange range);

// What one block holds: pages of the process's own (`own`), pages only in the image (`image`).
// `own` wins; pages in `dropped` are not taken from the image; the rest is absent and stays so.
struct BlockContent {
  std::vector<VaddrRange> image;
  std::vector<VaddrRange> own;
  [[nodiscard]] Bytes size() const;
  // Every page present, of an aligned 2 MiB block: fit for a huge page without costing memory.
  [[nodiscard]] bool IsFullBlock(VaddrRange block) const;
};
[[nodiscard]] BlockContent ContentOf(VaddrRange block, const RangeSet& image_data,
                                     const RangeSet& own, const RangeSet& dropped);

// How many bytes a window may swap so that its pause stays below a bound: follows what the last
// windows took.
class Pacer {
 public:
  Pacer(Nanos max_pause, Bytes first, Bytes most)
      : max_pause_(max_pause), size_(first), most_(most) {}
  [[nodiscard]] Bytes batch_size() const { return size_; }
  // Pages written meanwhile that may still be copied within the pause.
  [[nodiscard]] PageCount dirty_limit() const;
  // What the program copied on write of a batch, and its swap frees.
  [[nodiscard]] Bytes freed_limit() const;
  void Swapped(Nanos pause);
  void TooDirty();

 private:
  Nanos max_pause_;
  Bytes size_;
  Bytes most_;
};

}  // namespace unmoor
