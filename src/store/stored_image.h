// StoredImage: an image directory opened to read all of its memory, wherever its pages are.
//
// Manifest and indexes are checked as a restore checks them; page data only by whoever asks
// (VerifyRun). The layers stay open, so the directory may go meanwhile. Immutable after Open.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "criu/page_runs.h"
#include "image/layer_reader.h"
#include "image/manifest.h"
#include "image/overlay.h"

namespace unmoor {

class StoredImage {
 public:
  // The caller holds whatever lock it needs.
  [[nodiscard]] static Result<StoredImage> Open(const std::string& directory);
  StoredImage(StoredImage&&) = default;
  StoredImage& operator=(StoredImage&&) = delete;

  [[nodiscard]] const std::string& directory() const { return directory_; }  // absolute
  [[nodiscard]] const Manifest& manifest() const { return manifest_; }
  [[nodiscard]] const std::vector<LayerReader>& layers() const { return layers_; }
  [[nodiscard]] Result<VmaPages> Resolve(uint32_t vpid, const ManifestVma& vma) const {
    return overlay_->Resolve(vpid, vma);
  }
  // That the blocks of a run match their hashes. Needs LoadHashes().
  [[nodiscard]] Result<> LoadHashes();
  [[nodiscard]] Result<> VerifyRun(const OverlayRun& run) const;

  // Pages of all mapped VMAs of a task, ascending.
  [[nodiscard]] Result<std::vector<OverlayRun>> LayerPages(const ManifestTask& task) const;
  // The same as runs of files.
  [[nodiscard]] std::vector<criu::PageRun> ToPageRuns(const std::vector<OverlayRun>& runs) const;

  // Bytes of pages in all layers that some VMA shows: each page of a file once.
  [[nodiscard]] Result<Bytes> ShownBytes() const;

 private:
  StoredImage() = default;

  std::string directory_;
  Manifest manifest_;
  std::vector<LayerReader> layers_;
  std::optional<Overlay> overlay_;  // of layers_, whose elements stay where they are
};

}  // namespace unmoor
