// See repair.h.
#include "store/repair.h"

#include <fcntl.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "base/fault_point.h"
#include "base/log.h"
#include "base/zero.h"
#include "image/layout.h"
#include "image/packed_layer.h"
#include "os/file.h"
#include "store/pending_file.h"

namespace unmoor {
namespace {

// What of a layer's pages is sound, whichever form it has.
class BlockSource {
 public:
  BlockSource(const std::string& directory, const std::string& id, const LayerIndex& index)
      : path_(LayerPagesPath(directory, id)) {
    if (!IsPackedLayer(directory, id)) {
      pages_ = OpenRegularFile(path_).value_or(Fd());
      return;
    }
    path_ = LayerPackedPath(directory, id);
    auto file = OpenRegularFile(path_);
    auto packed = file ? PackedReader::Open(std::move(*file), path_, index)
                       : Result<PackedReader>(Failure(file.error()));
    if (packed) packed_.emplace(std::move(*packed));
    piece_.resize(packed_format::kPieceSize);
  }

  // Fills `block`. False: it is not there, or is not what `hash` says.
  [[nodiscard]] bool Read(FileOffset at, uint64_t hash, std::span<std::byte> block) {
    if (packed_) {
      const uint64_t piece = at.value / packed_format::kPieceSize;
      if (piece_number_ != piece) sound_ = Expand(piece);
      piece_number_ = piece;
      std::copy_n(piece_.begin() + static_cast<ptrdiff_t>(at.value % packed_format::kPieceSize),
                  block.size(), block.begin());
      return sound_ && index_format::Checksum(block) == hash;
    }
    return pages_.valid() && ReadExactlyAt(pages_.get(), block, at, path_) &&
           index_format::Checksum(block) == hash;
  }

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] Compression compression() const {
    return packed_ ? packed_->compression() : Compression();
  }

 private:
  // The 2 MiB of pages that a frame stands for, into piece_.
  [[nodiscard]] bool Expand(uint64_t piece) {
    const auto number = packed_->FindFrame(FileOffset(piece * packed_format::kPieceSize));
    if (!number) return false;
    const packed_format::Frame& frame = packed_->plan().frames[*number];
    std::vector<std::byte> content(frame.content);
    const auto stored = packed_->ReadStored(*number, stored_);
    if (!stored || !packed_->Expand(*number, *stored, decompressor_, content)) return false;
    packed_format::SpreadFrame(packed_->plan(), frame, content, piece_);
    return true;
  }

  std::string path_;
  Fd pages_;
  std::optional<PackedReader> packed_;
  std::vector<std::byte> piece_;
  std::optional<uint64_t> piece_number_;
  bool sound_ = false;
  std::vector<std::byte> stored_;
  Decompressor decompressor_;
};

// Behind it the mended form is in its place.
Result<> PutInPlace(PendingFile& mended) {
  UNMOOR_TRY(mended.Sync());
  UNMOOR_TRY(FaultPoint("repair.before_rename"));
  return mended.MoveIntoPlace();
}

Result<> WriteMendedPages(const LayerIndex& index, BlockSource& ours, BlockSource& theirs,
                          const PendingFile& mended) {
  UNMOOR_TRY(Truncate(mended.fd(), Bytes(index.header.pages_size), mended.path()));
  std::vector<std::byte> block(kBlockSize);
  for (size_t i = 0; i < index.blocks.size(); ++i) {
    const FileOffset at(index.blocks[i] * kBlockSize);
    if (!ours.Read(at, index.hashes[i], block) && !theirs.Read(at, index.hashes[i], block)) {
      return UserError(
          "{} cannot be repaired: the 64 KiB of pages at offset {} are damaged in {} "
          "too",
          ours.path(), at.value, theirs.path());
    }
    for (size_t page = 0; page < kBlockSize; page += kPageSize) {
      const auto bytes = std::span<const std::byte>(block).subspan(page, kPageSize);
      if (IsZero(bytes)) continue;
      UNMOOR_TRY(WriteExactlyAt(mended.fd(), bytes, at + Bytes(page), mended.path()));
    }
  }
  return {};
}

Result<> MendPages(const std::string& directory, const std::string& from, const std::string& id,
                   const LayerIndex& index) {
  BlockSource ours(directory, id, index);
  BlockSource theirs(from, id, index);
  PendingFile pages(LayerPagesPath(directory, id), kRepairInfix);
  UNMOOR_TRY(pages.Create());
  UNMOOR_TRY(WriteMendedPages(index, ours, theirs, pages));
  if (!IsPackedLayer(directory, id)) return PutInPlace(pages);
  PendingFile packed(LayerPackedPath(directory, id), kRepairInfix);
  UNMOOR_TRY(packed.Name());
  const auto size =
      PackLayer(pages.path(), LayerIndexPath(directory, id), packed.path(), ours.compression(), {});
  if (!size) return Failure(size.error());
  return PutInPlace(packed);
}

Result<> MendIndex(const std::string& ours, const std::string& theirs, const ManifestLayer& entry) {
  if (const auto found = ReadLayerIndex(theirs, &entry); !found) {
    return Failure(found.error().WithContext(fmt::format("{} cannot be repaired", ours)));
  }
  PendingFile mended(ours, kRepairInfix);
  UNMOOR_TRY(mended.Create());
  UNMOOR_ASSIGN(const std::string bytes, ReadFile(theirs, Bytes(uint64_t{8} << 30)));
  UNMOOR_TRY(
      WriteExactlyAt(mended.fd(), std::as_bytes(std::span(bytes)), FileOffset(0), mended.path()));
  return PutInPlace(mended);
}

bool HoldsLayer(const std::string& directory, const std::string& id) {
  return Exists(LayerPagesPath(directory, id)) || Exists(LayerPackedPath(directory, id)) ||
         Exists(LayerIndexPath(directory, id));
}

}  // namespace

Result<LayerVerdict> RepairLayer(const std::string& directory, const std::string& from,
                                 const ManifestLayer& entry, const LayerVerdict& verdict) {
  const std::string layers = LayersDirectory(directory);
  RemovePending(layers, kRepairInfix);
  if (!HoldsLayer(from, entry.id)) {
    return UserError("{} does not hold layer {}, so {} cannot be repaired from it", from, entry.id,
                     directory);
  }
  if (!Exists(layers)) UNMOOR_TRY(MakeDirectory(layers, 0700));
  if (verdict.index) {
    UNMOOR_TRY(MendPages(directory, from, entry.id, *verdict.index));
  } else {
    UNMOOR_TRY(
        MendIndex(LayerIndexPath(directory, entry.id), LayerIndexPath(from, entry.id), entry));
  }
  UNMOOR_TRY(SyncPath(layers));
  return IsPackedLayer(directory, entry.id)
             ? VerifyPackedLayer(directory, entry.id, &entry, true, {})
             : VerifyLayer(directory, entry.id, &entry, {});
}

}  // namespace unmoor
