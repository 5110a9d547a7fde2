// See repair.h.
#include "store/repair.h"

#include <fcntl.h>

#include <algorithm>
#include <utility>

#include "base/fault_point.h"
#include "base/log.h"
#include "base/zero.h"
#include "image/layout.h"
#include "os/file.h"

namespace unmoor {
namespace {

constexpr std::string_view kInfix = ".repair-";

// A file beside its place; removed unless it got there.
class PendingFile {
 public:
  explicit PendingFile(std::string place) : place_(std::move(place)) {}
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;
  ~PendingFile() {
    if (!path_.empty()) (void)RemoveFile(path_);
  }
  [[nodiscard]] Result<> Create() {
    UNMOOR_ASSIGN(const std::string id, NewId());
    const std::string path = place_ + std::string(kInfix) + id.substr(0, 6);
    UNMOOR_ASSIGN(fd_, OpenFile(path, O_RDWR | O_CREAT | O_EXCL, 0600));
    path_ = path;
    return {};
  }
  [[nodiscard]] Result<> MoveIntoPlace() {
    UNMOOR_TRY(SyncFd(fd_.get(), path_));
    UNMOOR_TRY(FaultPoint("repair.before_rename"));
    UNMOOR_TRY(Rename(path_, place_));
    path_.clear();
    return {};
  }
  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string place_;
  std::string path_;
  Fd fd_;
};

// What a repair that was killed left in DIR/layers.
void RemoveLeftovers(const std::string& layers) {
  const auto names = ListDirectory(layers);
  if (!names) return;
  for (const std::string& name : *names) {
    if (name.find(kInfix) == std::string::npos) continue;
    spdlog::info("removing {}/{}, left by a repair that did not finish", layers, name);
    (void)RemoveFile(layers + "/" + name);
  }
}

bool Matches(const Fd& fd, const std::string& path, FileOffset at, uint64_t hash,
             std::span<std::byte> block) {
  return fd.valid() && ReadExactlyAt(fd.get(), block, at, path) &&
         index_format::Checksum(block) == hash;
}

Result<> WriteMendedPages(const LayerIndex& index, const std::string& ours,
                          const std::string& theirs, const PendingFile& mended) {
  Fd own = OpenFile(ours, O_RDONLY).value_or(Fd());
  Fd other = OpenFile(theirs, O_RDONLY).value_or(Fd());
  UNMOOR_TRY(Truncate(mended.fd(), Bytes(index.header.pages_size), mended.path()));
  std::vector<std::byte> block(kBlockSize);
  for (size_t i = 0; i < index.blocks.size(); ++i) {
    const FileOffset at(index.blocks[i] * kBlockSize);
    if (!Matches(own, ours, at, index.hashes[i], block) &&
        !Matches(other, theirs, at, index.hashes[i], block)) {
      return UserError("{} cannot be repaired: the 64 KiB at offset {} are damaged in {} too", ours,
                       at.value, theirs);
    }
    for (size_t page = 0; page < kBlockSize; page += kPageSize) {
      const auto bytes = std::span<const std::byte>(block).subspan(page, kPageSize);
      if (IsZero(bytes)) continue;
      UNMOOR_TRY(WriteExactlyAt(mended.fd(), bytes, at + Bytes(page), mended.path()));
    }
  }
  return {};
}

Result<> MendIndex(const std::string& ours, const std::string& theirs) {
  PendingFile mended(ours);
  UNMOOR_TRY(mended.Create());
  UNMOOR_ASSIGN(const std::string bytes, ReadFile(theirs, Bytes(uint64_t{8} << 30)));
  UNMOOR_TRY(WriteExactlyAt(mended.fd(), std::as_bytes(std::span(bytes)), FileOffset(0),
                            mended.path()));
  return mended.MoveIntoPlace();
}

}  // namespace

Result<LayerVerdict> RepairLayer(const std::string& directory, const std::string& from,
                                 const ManifestLayer& entry, const LayerVerdict& verdict) {
  const std::string layers = LayersDirectory(directory);
  RemoveLeftovers(layers);
  const std::string ours = LayerPagesPath(directory, entry.id);
  const std::string theirs = LayerPagesPath(from, entry.id);
  const std::string their_index = LayerIndexPath(from, entry.id);
  if (IsPackedLayer(from, entry.id)) {
    return UserError("{} is packed; run 'unmoor unpack {}' first, to repair {} from it", from, from,
                     directory);
  }
  if (!Exists(theirs) && !Exists(their_index)) {
    return UserError("{} does not hold layer {}, so {} cannot be repaired from it", from, entry.id,
                     directory);
  }
  if (!Exists(layers)) UNMOOR_TRY(MakeDirectory(layers, 0700));
  if (verdict.index) {
    PendingFile mended(ours);
    UNMOOR_TRY(mended.Create());
    UNMOOR_TRY(WriteMendedPages(*verdict.index, ours, theirs, mended));
    UNMOOR_TRY(mended.MoveIntoPlace());
  } else {
    if (const auto found = ReadLayerIndex(their_index, &entry); !found) {
      return Failure(found.error().WithContext(
          fmt::format("{} cannot be repaired", LayerIndexPath(directory, entry.id))));
    }
    UNMOOR_TRY(MendIndex(LayerIndexPath(directory, entry.id), their_index));
  }
  UNMOOR_TRY(SyncPath(layers));
  return VerifyLayer(directory, entry.id, &entry, {});
}

}  // namespace unmoor
