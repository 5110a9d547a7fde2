// See layer_source.h.
#include "image/layer_source.h"

#include <algorithm>
#include <utility>

#include "image/layout.h"
#include "image/packed_layer.h"
#include "os/file.h"

namespace unmoor {
namespace {

class PlainSource final : public LayerSource {
 public:
  explicit PlainSource(LayerReader reader) : reader_(std::move(reader)) {}

  [[nodiscard]] const LayerInfo& info() const override { return reader_.info(); }
  [[nodiscard]] const std::string& path() const override { return reader_.pages_path(); }
  [[nodiscard]] const Fd& file() const override { return reader_.pages_fd(); }
  [[nodiscard]] uint64_t piece_size() const override { return kBlockSize; }
  [[nodiscard]] Result<> LoadHashes() override { return reader_.LoadHashes(); }
  [[nodiscard]] Result<> ReadPiece(FileOffset begin, std::span<std::byte> into,
                                   Scratch& /*scratch*/) const override {
    UNMOOR_TRY(ReadExactlyAt(file().get(), into, begin, path()));
    return reader_.CheckBlock(begin, into);
  }
  [[nodiscard]] const LayerReader* plain() const override { return &reader_; }

 private:
  LayerReader reader_;
};

class PackedSource final : public LayerSource {
 public:
  explicit PackedSource(PackedReader reader) : reader_(std::move(reader)) {
    const LayerIndex& index = reader_.index();
    info_.id = index.header.id;
    info_.file_size = Bytes(index.header.pages_size);
    info_.data_bytes = Bytes(index.header.data_bytes);
    info_.extents = index.tables.extents;
    info_.segments = index.tables.segments;
    info_.index_checksum = index.header.header_checksum;
  }

  [[nodiscard]] const LayerInfo& info() const override { return info_; }
  [[nodiscard]] const std::string& path() const override { return reader_.path(); }
  [[nodiscard]] const Fd& file() const override { return reader_.file(); }
  [[nodiscard]] uint64_t piece_size() const override { return packed_format::kPieceSize; }
  [[nodiscard]] Result<> LoadHashes() override { return {}; }  // PackedReader has them
  [[nodiscard]] Result<> ReadPiece(FileOffset begin, std::span<std::byte> into,
                                   Scratch& scratch) const override {
    const auto number = reader_.FindFrame(begin);
    if (!number) {
      std::ranges::fill(into, std::byte{0});
      return {};
    }
    UNMOOR_ASSIGN(const auto stored, reader_.ReadStored(*number, scratch.stored));
    const packed_format::Frame& frame = reader_.plan().frames[*number];
    if (frame.content == into.size()) {
      return reader_.Expand(*number, stored, scratch.decompressor, into);
    }
    scratch.content.resize(packed_format::kPieceSize);
    const auto content = std::span(scratch.content).first(frame.content);
    UNMOOR_TRY(reader_.Expand(*number, stored, scratch.decompressor, content));
    packed_format::SpreadFrame(reader_.plan(), frame, content, into);
    return {};
  }

 private:
  PackedReader reader_;
  LayerInfo info_;
};

}  // namespace

std::unique_ptr<LayerSource> LayerSource::Plain(LayerReader reader) {
  return std::make_unique<PlainSource>(std::move(reader));
}

Result<std::unique_ptr<LayerSource>> LayerSource::Open(const std::string& dir,
                                                       const ManifestLayer& entry) {
  if (!IsPackedLayer(dir, entry.id)) {
    UNMOOR_ASSIGN(LayerReader reader, LayerReader::Open(dir, entry));
    return Plain(std::move(reader));
  }
  UNMOOR_ASSIGN(PackedReader reader, PackedReader::Open(dir, entry));
  return std::unique_ptr<LayerSource>(std::make_unique<PackedSource>(std::move(reader)));
}

}  // namespace unmoor
