// LayerReader: a layer opened for restore, remap or verification; trusts nothing it reads.
//
// Open() reads the index's header, extents and segments (not the hashes, not the pages), checks
// magic, version, checksums, each count and range, order, overlap, alignment and congruence, and
// that the .pages file has the recorded size. Each error is one line naming the file and the
// offset. Immutable after Open but for LoadHashes; const functions may be called from any thread.
// Document: docs/format.md.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer.h"
#include "image/manifest.h"
#include "os/fd.h"

namespace unmoor {

class LayerReader {
 public:
  [[nodiscard]] static Result<LayerReader> Open(const std::string& pages_path,
                                                const std::string& index_path);
  // Of pages that somebody maps: their file may be shorter by now than its index says.
  [[nodiscard]] static Result<LayerReader> OpenMapped(Fd pages, const std::string& pages_path,
                                                      const std::string& index_path);
  // The layer `entry` of the checkpoint in `dir`; checks also that it is the one the manifest
  // means.
  [[nodiscard]] static Result<LayerReader> Open(const std::string& dir, const ManifestLayer& entry);

  [[nodiscard]] const std::string& id() const { return info_.id; }
  [[nodiscard]] const LayerInfo& info() const { return info_; }
  [[nodiscard]] const std::vector<Extent>& extents() const { return info_.extents; }
  [[nodiscard]] const std::vector<Segment>& segments() const { return info_.segments; }
  [[nodiscard]] const std::string& pages_path() const { return pages_path_; }
  [[nodiscard]] const Fd& pages_fd() const { return pages_; }  // read-only
  [[nodiscard]] const Fd& index_fd() const { return index_; }  // read-only
  // The extent holding the task's address, if any.
  [[nodiscard]] const Extent* FindExtent(uint32_t task_vpid, Vaddr at) const;

  // Reads the hash table and checks its checksum. Needed before Verify*; idempotent.
  [[nodiscard]] Result<> LoadHashes();
  // Reads the 64 KiB blocks that hold data and touch `range`, compares their hashes.
  [[nodiscard]] Result<> VerifyBlocks(FileRange range) const;
  // All blocks, and that nothing but zeros lies outside of them. `progress(done, total)` may be
  // empty.
  [[nodiscard]] Result<> VerifyAll(const std::function<void(Bytes, Bytes)>& progress = {}) const;
  // The same comparison for a block already in memory: `block` is its 64 KiB, `offset` a multiple
  // of 64 KiB. False: it differs. Blocks without data compare with zeros.
  [[nodiscard]] bool BlockMatches(FileOffset offset, std::span<const std::byte> block) const;
  // As BlockMatches; a user's error, with the file and offset, where it differs.
  [[nodiscard]] Result<> CheckBlock(FileOffset offset, std::span<const std::byte> block) const;

 private:
  struct BlockHash {
    uint64_t block;  // file offset / 64 KiB
    uint64_t hash;
  };
  LayerReader() = default;
  [[nodiscard]] Result<> VerifyHoles() const;

  LayerInfo info_;
  std::string pages_path_;
  std::string index_path_;
  Fd pages_;
  Fd index_;
  uint64_t hash_offset_ = 0;
  uint64_t hash_count_ = 0;
  uint64_t hash_checksum_ = 0;
  bool hashes_loaded_ = false;
  std::vector<BlockHash> hashes_;  // ascending by block
};

}  // namespace unmoor
