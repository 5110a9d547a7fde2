// DeltaWriter: writes a new layer, of each VMA only what differs from the layers it stands on.
//
// Pages come ascending within a task, task after task. Each run is compared with what the VMA's
// base shows there; what is equal is left out, and what the base shows but does not come (given
// back, never touched again) is written as pages of zeros, so that none of the base's bytes can
// show through. Without a base zeros are left out and all else is written.
//
// A base is made of layers that are there (an earlier checkpoint's), or of what was written of
// another task just before: a forked child's memory is mostly its parent's, and is stored, and
// after a restore mapped, once.
//
// Knows nothing of processes; the model test drives it with a simulated memory. One thread.
// Document: docs/format.md, "Deltas".
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer_reader.h"
#include "image/layer_writer.h"
#include "image/manifest.h"
#include "image/overlay.h"

namespace unmoor {

// What a VMA stands on. Layers are numbered as those given to the DeltaWriter; the next number is
// the layer being written.
struct LayerBase {
  ManifestVma vma;  // its range is that of the new VMA
  VmaPages pages;   // what these layers show there
};

// A part of a VMA that maps a layer, numbered as those given to the DeltaWriter: what does not come
// of it is what the layer shows there.
struct LayerPiece {
  VaddrRange range;
  uint32_t layer = 0;
  FileOffset offset;  // of range.begin
};

// A VMA whose pages go to the layer.
struct DeltaVma {
  VaddrRange range;
  std::optional<LayerBase> base;  // nothing: it is written in full
  std::vector<LayerPiece> pieces =
      {};  // ascending, apart; of the base's own layer where it has one
};

// Whether a VMA of `data` bytes may stand on `base`: the deltas' pages are copied at restore, so
// there must not be too many of them, and not too many deltas either.
[[nodiscard]] bool IsWorthwhile(const LayerBase& base, Bytes data);

// Reads one page of the new memory; false: it cannot be read.
using PageSource = std::function<bool(Vaddr, std::span<std::byte>)>;

class DeltaWriter {
 public:
  // `layers` must outlive this. `shares`: FindShared may be asked for.
  DeltaWriter(std::string layers_directory, std::string layer_id,
              std::span<const LayerReader> layers, bool shares,
              WriteBack write_back = WriteBack::kLater);
  DeltaWriter(const DeltaWriter&) = delete;  // overlay_ points into it
  DeltaWriter& operator=(const DeltaWriter&) = delete;

  // Once for each task, before its pages. VMAs ascending and apart.
  [[nodiscard]] Result<> AddTask(uint32_t vpid, std::vector<DeltaVma> vmas);
  // Whole pages inside one VMA of the task.
  [[nodiscard]] Result<> Write(uint32_t vpid, Vaddr at, std::span<const std::byte> pages);

  // Where nothing is compared, the same without a copy: room for some of the pages that come next,
  // to be filled and handed over by Filled before any other call. Empty: use Write.
  [[nodiscard]] Result<std::span<std::byte>> Room(uint32_t vpid, Vaddr at, Bytes want);
  [[nodiscard]] Result<> Filled(uint32_t vpid, Vaddr at, Bytes size);

  // What was written of `owner` where another task has `range`; nothing when it has no such VMA, or
  // a VMA there could not grow into zeros. All tasks so far must be complete: nothing more may be
  // written of them.
  [[nodiscard]] Result<std::optional<LayerBase>> FindShared(uint32_t owner, VaddrRange range);
  // The share of the pages `base` shows that `now` has otherwise, told from a sample of 128.
  [[nodiscard]] double SampleChanged(const LayerBase& base, const PageSource& now) const;
  // Whether a forked child with `data` bytes of pages is worth standing on what FindShared found:
  // what is equal is neither written nor, after a restore, in memory twice, but what differs is
  // copied then.
  [[nodiscard]] bool IsMostlyShared(const LayerBase& base, Bytes data, const PageSource& now) const;
  // The pages of `range` as `base` shows them.
  [[nodiscard]] Result<> Read(const LayerBase& base, VaddrRange range,
                              std::span<std::byte> to) const;

  // Once, at the end. Nothing: no task had a VMA. `sync` as LayerWriter::Finish has it.
  [[nodiscard]] Result<std::optional<LayerInfo>> Finish(bool sync);
  // Fills in where the pages of each mapped VMA of `manifest` are, and adds the layers this needs.
  // `fresh` is what Finish returned.
  [[nodiscard]] Result<> Describe(Manifest& manifest, const LayerInfo& fresh,
                                  const std::string& directory) const;

 private:
  // Pages are looked at before they are written.
  [[nodiscard]] bool compares() const { return shares_ || !layers_.empty(); }
  [[nodiscard]] uint32_t own() const { return static_cast<uint32_t>(layers_.size()); }
  [[nodiscard]] Result<> WriteDifferences(uint32_t vpid, const DeltaVma& vma, Vaddr at,
                                          std::span<const std::byte> pages);
  // The pages below `end` that have not come: those of pieces are written as their layers show
  // them, of all others the bases' are hidden.
  [[nodiscard]] Result<> Settle(uint32_t vpid, Vaddr end);
  [[nodiscard]] Result<> HideVanished(uint32_t vpid, const DeltaVma& vma, VaddrRange range);
  [[nodiscard]] Result<> WriteMapped(uint32_t vpid, const DeltaVma& vma, const LayerPiece& piece,
                                     VaddrRange range);
  [[nodiscard]] Result<> CopyMapped(uint32_t vpid, const DeltaVma& vma, const LayerPiece& piece,
                                    VaddrRange range);
  // Where the pages of `vma` are, `extent` being its own in the new layer.
  [[nodiscard]] ManifestVma PlaceOf(const DeltaVma& vma, const Extent& extent) const;

  const std::string directory_;
  const std::string id_;
  const std::span<const LayerReader> layers_;
  const bool shares_;
  const WriteBack write_back_;
  std::optional<LayerWriter> writer_;
  std::map<uint32_t, std::vector<DeltaVma>> vmas_;
  std::map<uint32_t, Vaddr> settled_;  // the bases' pages below it have come or are hidden
  std::set<uint32_t> complete_;
  // Of the complete tasks.
  LayerInfo written_;
  std::map<std::pair<uint32_t, Vaddr>, Extent> extents_;
  std::optional<Overlay> overlay_;  // of layers_ and written_
  std::vector<std::byte> base_bytes_;
  std::vector<std::byte> mapped_bytes_;
};

}  // namespace unmoor
