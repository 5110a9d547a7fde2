// A layer in its transport form: packed, unpacked and checked, frame by frame, on all cores.
//
//   PackLayer     .pages → .packed       each block held against its hash first
//   UnpackLayer   .packed → .pages       holes kept; each block held against its hash before it is
//                                        written
//   VerifyPacked  every frame's checksum, or (deep) its content too
//
// All three work on frames independently: a thread takes the next one, so memory is a few frames a
// thread. Nothing in a file is believed that does not follow from the index (packed_format.h). What
// an unfinished run leaves belongs to whoever owns the directory (Publisher). A failure names the
// file; the first one stops all threads. Document: docs/format.md, "Packed layer".
// Fault points: pack.frame, pack.table, unpack.frame, unpack.end.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/compression.h"
#include "image/manifest.h"
#include "image/packed_format.h"
#include "image/verify.h"
#include "os/fd.h"

namespace unmoor {

struct PackWork {
  unsigned threads = 0;                      // 0: as many as there are processors
  std::function<void(Bytes done)> progress;  // bytes of pages; may be empty
};

struct PackedSize {
  Bytes content;  // of pages
  Bytes stored;   // of the packed file
};

// A packed layer opened for reading: header, trailer and table checked. Immutable; its functions
// may be called from several threads.
class PackedReader {
 public:
  // `expected`: the manifest's entry, which the index must be the one of; may be null.
  [[nodiscard]] static Result<PackedReader> Open(const std::string& packed_path,
                                                 const std::string& index_path,
                                                 const ManifestLayer* expected);
  // The layer `entry` of the checkpoint in `dir`.
  [[nodiscard]] static Result<PackedReader> Open(const std::string& dir,
                                                 const ManifestLayer& entry);
  // For tests and fuzzing: any file and an index already read.
  [[nodiscard]] static Result<PackedReader> Open(Fd file, const std::string& name,
                                                 LayerIndex index);

  [[nodiscard]] const LayerIndex& index() const { return index_; }
  [[nodiscard]] const packed_format::FramePlan& plan() const { return plan_; }
  [[nodiscard]] const Compression& compression() const { return compression_; }
  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] const Fd& file() const { return file_; }  // read-only
  [[nodiscard]] PackedSize size() const;
  [[nodiscard]] const packed_format::FrameHead& head(size_t frame) const { return heads_[frame]; }
  // Its head and stored bytes.
  [[nodiscard]] FileRange FileRangeOf(size_t frame) const;
  // The number of the frame that holds the 2 MiB of .pages around `at`; nothing: no page is there.
  [[nodiscard]] std::optional<size_t> FindFrame(FileOffset at) const;

  // Reads a frame as it is stored and compares its head and checksum. A view of `buffer`.
  [[nodiscard]] Result<std::span<const std::byte>> ReadStored(size_t frame,
                                                              std::vector<std::byte>& buffer) const;
  // Decompresses it to `content`, which is as long as its content, and compares every block with
  // its hash.
  [[nodiscard]] Result<> Expand(size_t frame, std::span<const std::byte> stored,
                                Decompressor& decompressor, std::span<std::byte> content) const;

 private:
  PackedReader() = default;
  [[nodiscard]] Result<> Load(Fd file, const std::string& name, LayerIndex index);

  std::string path_;
  Fd file_;
  LayerIndex index_;
  packed_format::FramePlan plan_;
  std::vector<packed_format::FrameHead> heads_;
  Compression compression_;
  Bytes file_size_;
};

// Writes `packed_path`, which must not exist.
[[nodiscard]] Result<PackedSize> PackLayer(const std::string& pages_path,
                                           const std::string& index_path,
                                           const std::string& packed_path,
                                           const Compression& compression, const PackWork& work);
// Writes `pages_path`, which must not exist. With `start_write_back` pages start on their way to
// the disk as they come, for a publication that waits for them.
[[nodiscard]] Result<> UnpackLayer(const PackedReader& packed, const std::string& pages_path,
                                   bool start_write_back, const PackWork& work);

// Layer `id` of `dir`, as VerifyLayer for a packed one. Damages tell bytes of the packed file, and
// of the page image in `pages`.
[[nodiscard]] LayerVerdict VerifyPackedLayer(const std::string& dir, const std::string& id,
                                             const ManifestLayer* expected, bool deep,
                                             const VerifyOptions& options);

}  // namespace unmoor
