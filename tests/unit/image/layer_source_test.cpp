// The pages of a layer are the same whichever form it has, and nobody sees one that is not right.
#include "image/layer_source.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "image/compression.h"
#include "image/index_format.h"
#include "image/packed_layer.h"
#include "image/verified_pages.h"
#include "image_fixture.h"

namespace unmoor {
namespace {

constexpr Compression kLz4{Codec::kLz4, 0};
constexpr Compression kZstd{Codec::kZstd, 1};

// Full and sparse frames, one that does not compress, and pages of zeros among the others.
Result<LayerInfo> MakeLayer(const std::string& directory) {
  UNMOOR_ASSIGN(LayerWriter writer, LayerWriter::Create(directory, kTestLayerId));
  const std::vector<VaddrRange> vmas = {Pages(0x7f0000123000, 40), Pages(0x7f0000800000, 3000)};
  UNMOOR_TRY(writer.AddTask(7, vmas));
  for (uint64_t page = 0; page < 40; page += 3) {
    const Vaddr at = vmas[0].begin + Bytes(page * kPageSize);
    UNMOOR_TRY(writer.Write(7, at, PageContents(7, at, 1)));
  }
  auto pages = PageContents(7, vmas[1].begin, 2500);
  std::mt19937_64 random(4711);
  for (size_t i = 512 * kPageSize; i < 1024 * kPageSize; ++i) pages[i] = std::byte(random());
  std::fill_n(pages.begin() + 1100 * kPageSize, 30 * kPageSize, std::byte{0});
  UNMOOR_TRY(writer.Write(7, vmas[1].begin, pages));
  return writer.Finish(true);
}

class LayerSourceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(MakeDirectory(plain()));
    const auto info = MakeLayer(LayersDirectory(plain()));
    ASSERT_OK(info);
    info_ = *info;
    entry_ = MakeTestManifest(info_).layers[0];
  }
  [[nodiscard]] std::string plain() const { return directory_.path() + "/plain"; }
  // A directory with the same layer, packed.
  std::string Pack(const Compression& compression) {
    const std::string packed = directory_.path() + "/" + ToString(compression);
    EXPECT_TRUE(MakeDirectory(packed));
    EXPECT_TRUE(MakeDirectory(LayersDirectory(packed)));
    const std::string index = LayerIndexPath(plain(), entry_.id);
    EXPECT_TRUE(CopyFile(index, LayerIndexPath(packed, entry_.id)));
    EXPECT_TRUE(PackLayer(LayerPagesPath(plain(), entry_.id), index,
                          LayerPackedPath(packed, entry_.id), compression, {}));
    return packed;
  }
  [[nodiscard]] LayerSources Open(const std::string& directory) const {
    LayerSources sources;
    auto source = LayerSource::Open(directory, entry_);
    EXPECT_TRUE(source) << source.error().message();
    EXPECT_TRUE((*source)->LoadHashes());
    sources.push_back(*std::move(source));
    return sources;
  }

  TemporaryDirectory directory_;
  LayerInfo info_;
  ManifestLayer entry_;
};

TEST_F(LayerSourceTest, TheSamePagesComeFromEitherForm) {
  const LayerSources expected = Open(plain());
  EXPECT_NE(expected[0]->plain(), nullptr);
  for (const Compression& compression : {kLz4, kZstd}) {
    const LayerSources found = Open(Pack(compression));
    EXPECT_EQ(found[0]->plain(), nullptr);
    EXPECT_EQ(found[0]->info().segments, info_.segments);
    EXPECT_EQ(found[0]->info().extents, info_.extents);
    LayerSource::Scratch scratch;
    std::vector<std::byte> piece(found[0]->piece_size());
    std::vector<std::byte> block(kBlockSize);
    // Beyond the pages too: growth gaps read as zeros.
    for (uint64_t at = 0; at < 40 * kHugePageSize; at += kBlockSize) {
      if (at % piece.size() == 0) {
        std::ranges::fill(piece, std::byte{77});
        ASSERT_OK(found[0]->ReadPiece(FileOffset(at), piece, scratch));
      }
      ASSERT_OK(expected[0]->ReadPiece(FileOffset(at), block, scratch));
      ASSERT_TRUE(
          std::ranges::equal(block, std::span(piece).subspan(at % piece.size(), kBlockSize)))
          << at;
    }
  }
}

TEST_F(LayerSourceTest, LargePiecesComeFromEitherForm) {
  const LayerSources plain_layers = Open(plain());
  const LayerSources packed_layers = Open(Pack(kZstd));
  VerifiedPages expected(plain_layers);
  VerifiedPages found(packed_layers);
  for (int round = 0; round < 2; ++round) {
    for (const Segment& segment : info_.segments) {
      for (FileOffset at = segment.offset; at < segment.file_range().end;) {
        const FileRange range{at, segment.file_range().end};
        const auto theirs = found.At(0, range);
        ASSERT_OK(theirs);
        const auto ours = expected.At(0, {at, std::min(range.end, at + Bytes(theirs->size()))});
        ASSERT_OK(ours);
        ASSERT_TRUE(std::ranges::equal(*ours, theirs->first(ours->size()))) << at.value;
        at = at + Bytes(ours->size());
      }
    }
  }
}

// A frame that is stored as it is, changed, with every checksum of the packed file put right again:
// the hashes of the index alone can tell.
TEST_F(LayerSourceTest, AFrameThatOnlyItsHashesTellIsWrongIsNotBelieved) {
  const std::string directory = Pack(kLz4);
  const std::string path = LayerPackedPath(directory, entry_.id);
  const auto packed = PackedReader::Open(path, LayerIndexPath(directory, entry_.id), &entry_);
  ASSERT_OK(packed);
  std::vector<packed_format::FrameHead> heads;
  for (size_t i = 0; i < packed->plan().frames.size(); ++i) heads.push_back(packed->head(i));
  const auto stored_plain = std::ranges::find_if(
      heads, [](const auto& head) { return head.stored == packed_format::kPieceSize; });
  ASSERT_NE(stored_plain, heads.end());
  const Fd file = OpenFile(path, O_RDWR).value();
  std::vector<std::byte> stored(stored_plain->stored);
  const FileOffset place(stored_plain->place);
  ASSERT_OK(ReadExactlyAt(file.get(), stored, place + Bytes(packed_format::kHeadSize), path));
  stored[3 * kBlockSize + 5] ^= std::byte{1};
  stored_plain->checksum = index_format::Checksum(stored);
  ASSERT_OK(
      WriteExactlyAt(file.get(), packed_format::EncodeHeads({&*stored_plain, 1}), place, path));
  ASSERT_OK(WriteExactlyAt(file.get(), stored, place + Bytes(packed_format::kHeadSize), path));
  const auto table = packed_format::EncodeHeads(heads);
  const FileRange last = packed->FileRangeOf(heads.size() - 1);
  ASSERT_OK(WriteExactlyAt(file.get(), table, last.end, path));
  ASSERT_OK(WriteExactlyAt(file.get(), packed_format::EncodeTrailer(table, last.end.value),
                           last.end + Bytes(table.size()), path));

  const LayerSources layers = Open(directory);
  LayerSource::Scratch scratch;
  std::vector<std::byte> piece(layers[0]->piece_size());
  const FileOffset wrong(stored_plain->piece * packed_format::kPieceSize);
  const auto read = layers[0]->ReadPiece(wrong, piece, scratch);
  ASSERT_FALSE(read);
  EXPECT_NE(read.error().message().find(path + " is damaged"), std::string::npos);
  EXPECT_NE(read.error().message().find(
                fmt::format("the 64 KiB at {} of the pages", wrong.value + 3 * kBlockSize)),
            std::string::npos);
  VerifiedPages pages(layers);
  EXPECT_FALSE(pages.At(0, {wrong, wrong + Bytes(kPageSize)}));
  EXPECT_FALSE(pages.At(0, {wrong, wrong + Bytes(kPageSize)}));  // nor the second time
  EXPECT_TRUE(layers[0]->ReadPiece(wrong + Bytes(packed_format::kPieceSize), piece, scratch));
}

TEST_F(LayerSourceTest, AnIndexOfAnotherCheckpointIsRefused) {
  const std::string directory = Pack(kLz4);
  entry_.index_checksum ^= 1;
  EXPECT_FALSE(LayerSource::Open(directory, entry_));
  EXPECT_FALSE(LayerSource::Open(plain(), entry_));
}

}  // namespace
}  // namespace unmoor
