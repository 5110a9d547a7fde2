// Packed layers. The input is a list of edits of a sound packed file, six bytes each (place, what
// to do, value); then, unless the first byte is odd, its checksums are made right again, so that
// tables and decompression are reached.
#include <fcntl.h>

#include <cstring>
#include <random>

#include "base/little_endian.h"
#include "image/packed_layer.h"
#include "os/file.h"
#include "target.h"

namespace unmoor {
namespace {

namespace format = packed_format;

LayerIndex MakeIndex(const std::vector<std::byte>& pages) {
  LayerIndex index;
  index.header.id = "0123456789abcdef0123456789abcdef";
  index.header.header_checksum = 4711;
  index.header.pages_size = pages.size() + kHugePageSize;
  const std::vector<FileRange> runs = {{FileOffset(0), FileOffset(3 * kPageSize)},
                                       {FileOffset(5 * kPageSize), FileOffset(40 * kPageSize)},
                                       {FileOffset(510 * kPageSize), FileOffset(530 * kPageSize)}};
  for (const FileRange& run : runs) {
    index.tables.segments.push_back({1, {Vaddr(run.begin.value), Vaddr(run.end.value)}, run.begin});
    index.header.data_bytes += run.size().value;
  }
  index_format::ForEachDataBlock(index.tables.segments,
                                 [&](uint64_t block) { index.blocks.push_back(block); });
  for (const uint64_t block : index.blocks) {
    index.hashes.push_back(
        index_format::Checksum(std::span(pages).subspan(block * kBlockSize, kBlockSize)));
  }
  return index;
}

// The packed form of `pages` by `codec`, made here since PackLayer works on files.
struct Sound {
  LayerIndex index;
  std::vector<std::byte> file;
  size_t frames = 0;
};

Sound Make(Codec codec) {
  std::vector<std::byte> pages(4 * kHugePageSize);
  std::mt19937_64 random(1);
  for (size_t page = 0; page < 530; ++page) {
    const bool saved = page < 3 || (page >= 5 && page < 40) || page >= 510;
    for (size_t i = page * kPageSize; saved && i < (page + 1) * kPageSize; ++i) {
      pages[i] = static_cast<std::byte>(1 + (i % 512 == 0 ? random() % 200 : i % 7));
    }
  }
  Sound sound;
  sound.index = MakeIndex(pages);
  const format::FramePlan plan = format::PlanFrames(sound.index);
  sound.frames = plan.frames.size();
  sound.file = format::EncodeHeader({static_cast<uint32_t>(codec), 1}, sound.index, sound.frames);
  Compressor compressor({codec, 1});
  std::vector<format::FrameHead> heads;
  for (const format::Frame& frame : plan.frames) {
    std::vector<std::byte> content;
    for (size_t i = frame.first_run; i < frame.first_run + frame.run_count; ++i) {
      const auto part =
          std::span(pages).subspan(plan.runs[i].begin.value, plan.runs[i].size().value);
      content.insert(content.end(), part.begin(), part.end());
    }
    const auto stored = compressor.Compress(content).value();
    heads.push_back({frame.piece, frame.content, static_cast<uint32_t>(stored.size()),
                     index_format::Checksum(stored), sound.file.size()});
    const auto head = format::EncodeHeads({&heads.back(), 1});
    sound.file.insert(sound.file.end(), head.begin(), head.end());
    sound.file.insert(sound.file.end(), stored.begin(), stored.end());
  }
  const auto table = format::EncodeHeads(heads);
  const auto trailer = format::EncodeTrailer(table, sound.file.size());
  sound.file.insert(sound.file.end(), table.begin(), table.end());
  sound.file.insert(sound.file.end(), trailer.begin(), trailer.end());
  return sound;
}

// Gives the file the checksums of what it now holds, as far as it can be followed.
void Repair(std::vector<std::byte>& file, size_t frames) {
  const size_t table_bytes = frames * format::kHeadSize;
  if (file.size() < format::kHeaderSize + table_bytes + format::kTrailerSize) return;
  const size_t table_at = file.size() - format::kTrailerSize - table_bytes;
  for (size_t i = 0; i < frames; ++i) {
    const size_t entry = table_at + i * format::kHeadSize;
    const auto stored = GetLittleEndian<uint32_t>(file, entry + 12);
    const auto place = GetLittleEndian<uint64_t>(file, entry + 24);
    if (place > table_at || table_at - place < format::kHeadSize ||
        stored > table_at - place - format::kHeadSize) {
      continue;
    }
    PutLittleEndian(file, entry + 16,
                    index_format::Checksum(std::span<const std::byte>(file).subspan(
                        place + format::kHeadSize, stored)));
    std::memcpy(&file[place], &file[entry], format::kHeadSize);
  }
  PutLittleEndian(file, 120, index_format::Checksum(std::span(file).first(120)));
  const auto trailer = format::EncodeTrailer(
      std::span<const std::byte>(file).subspan(table_at, table_bytes), table_at);
  std::memcpy(&file[file.size() - format::kTrailerSize], trailer.data(), trailer.size());
}

void Edit(std::vector<std::byte>& file, std::span<const uint8_t> edit) {
  const size_t place =
      (size_t{edit[0]} | size_t{edit[1]} << 8 | size_t{edit[2]} << 16) % (file.size() + 1);
  const auto value = static_cast<std::byte>(edit[4]);
  switch (edit[3] % 5) {
    case 0:
      if (place < file.size()) file[place] ^= value;
      break;
    case 1:
      if (place < file.size()) file[place] = value;
      break;
    case 2:
      file.insert(file.begin() + static_cast<ptrdiff_t>(place), value);
      break;
    case 3:
      file.erase(file.begin() + static_cast<ptrdiff_t>(place),
                 file.begin() + static_cast<ptrdiff_t>(
                                    std::min(file.size(), place + static_cast<size_t>(edit[5]))));
      break;
    default:
      // Near the end, where table and trailer are.
      if (!file.empty()) file[file.size() - 1 - place % std::min<size_t>(file.size(), 128)] = value;
  }
}

void ReadAll(const std::vector<std::byte>& file, const LayerIndex& index) {
  const char* const folder = std::getenv("TMPDIR");
  Fd fd = OpenFile(folder != nullptr ? folder : "/tmp", O_TMPFILE | O_RDWR).value();
  UNMOOR_CHECK(WriteExactlyAt(fd.get(), file, FileOffset(0), "fuzzed").has_value());
  const auto packed = PackedReader::Open(std::move(fd), "fuzzed", index);
  if (!packed) return;
  Decompressor decompressor;
  std::vector<std::byte> buffer;
  std::vector<std::byte> content;
  for (size_t i = 0; i < packed->plan().frames.size(); ++i) {
    const auto stored = packed->ReadStored(i, buffer);
    content.resize(packed->plan().frames[i].content);
    if (stored) (void)packed->Expand(i, *stored, decompressor, content);
  }
}

}  // namespace
}  // namespace unmoor

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace unmoor;
  static const Sound sounds[] = {Make(Codec::kLz4), Make(Codec::kZstd)};
  if (size == 0) return 0;
  const Sound& sound = sounds[data[0] / 2 % 2];
  std::vector<std::byte> file = sound.file;
  constexpr size_t kEdit = 6;
  for (size_t at = 1; at + kEdit <= size && at < 64 * kEdit; at += kEdit) {
    Edit(file, {data + at, kEdit});
  }
  if (data[0] % 2 == 0) Repair(file, sound.frames);
  ReadAll(file, sound.index);
  return 0;
}
