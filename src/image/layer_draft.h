// LayerDraft: a layer whose pages may still change, until Finish makes a layer like any other of
// it.
//
// For memory that is written while its program runs: what the program has changed since is written
// once more in the same place, as often as one likes. So hashes and segments are made last, from
// what the file holds by then. Where a page was never written, or is all zeros now, the layer has
// none.
//
// One thread. Destroying an unfinished draft leaves its files to whoever owns the directory
// (Publisher). Document: docs/format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer.h"
#include "image/layout.h"
#include "os/fd.h"

namespace unmoor {

class LayerDraft {
 public:
  // Creates <directory>/<id>.pages and .index, which must not exist.
  [[nodiscard]] static Result<LayerDraft> Create(const std::string& directory,
                                                 const std::string& id);
  LayerDraft(LayerDraft&&) noexcept = default;
  LayerDraft& operator=(LayerDraft&&) noexcept = default;

  // Allocates an extent for a VMA (page-aligned, apart from the task's others).
  [[nodiscard]] Result<> AddVma(uint32_t task_vpid, VaddrRange vma);
  // Makes the layer show `pages` (whole ones, inside one VMA that was added) from `at` on; returns
  // the bytes that were written for it: pages that the layer shows already are not.
  [[nodiscard]] Result<Bytes> Show(uint32_t task_vpid, Vaddr at, std::span<const std::byte> pages);
  // The same with zeros for all of `range`.
  [[nodiscard]] Result<Bytes> ShowZeros(uint32_t task_vpid, VaddrRange range);

  // Waits until what was written is on the disk.
  [[nodiscard]] Result<> Sync();
  // Hashes what is there, writes the index, makes both files durable (fsync). Called once, nothing
  // else after it.
  [[nodiscard]] Result<LayerInfo> Finish();

 private:
  struct Place {
    Extent extent;
    std::vector<bool> held;  // of each page: the layer has it
  };
  LayerDraft() = default;
  [[nodiscard]] Result<Place*> Find(uint32_t task_vpid, VaddrRange range);
  [[nodiscard]] Result<> WriteRun(Place& place, size_t page, std::span<const std::byte> pages);
  void CollectTables(LayerInfo& info) const;

  std::string id_;
  std::string pages_path_;
  std::string index_path_;
  Fd pages_;
  Fd index_;
  LayoutAllocator layout_;
  std::map<std::pair<uint32_t, Vaddr>, Place> places_;  // by task and end of the VMA
  std::vector<std::byte> shown_;
};

}  // namespace unmoor
