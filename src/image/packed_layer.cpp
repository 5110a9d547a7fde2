// See packed_layer.h.
//
// PackLayer gives each frame its place in the file in order (Places), so that the file is the same
// whoever was first; the writing itself is done by the threads, each its own frame.
#include "image/packed_layer.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <optional>

#include "base/crew.h"
#include "base/fault_point.h"
#include "base/zero.h"
#include "image/index_format.h"
#include "image/layout.h"
#include "os/file.h"
#include "os/write_ring.h"

namespace unmoor {
namespace {

using packed_format::Frame;
using packed_format::FrameHead;
using packed_format::FramePlan;

constexpr unsigned kBuffers = 3;  // a thread's: one filled while the others are written

// Whoever waits for the work only wants to know how far it is.
Crew::Look Looking(const PackWork& work) {
  if (!work.progress) return {};
  return [&work](Bytes done) -> Result<> {
    work.progress(done);
    return {};
  };
}

// The first block of a frame whose content does not have its hash; its offset in the page image.
std::optional<FileOffset> FindDamagedBlock(const LayerIndex& index, const FramePlan& plan,
                                           const Frame& frame, std::span<const std::byte> content,
                                           std::vector<std::byte>& scratch) {
  scratch.resize(kBlockSize);
  size_t run = frame.first_run;
  size_t run_at = 0;  // of that run in `content`
  const size_t last_run = frame.first_run + frame.run_count;
  for (size_t i = frame.first_block; i < frame.first_block + frame.block_count; ++i) {
    const FileRange block{FileOffset(index.blocks[i] * kBlockSize),
                          FileOffset((index.blocks[i] + 1) * kBlockSize)};
    while (run < last_run && plan.runs[run].end <= block.begin) {
      run_at += plan.runs[run].size().value;
      ++run;
    }
    std::span<const std::byte> bytes;
    if (run < last_run && plan.runs[run].Contains(block)) {
      bytes = content.subspan(run_at + (block.begin - plan.runs[run].begin).value, kBlockSize);
    } else {
      std::ranges::fill(scratch, std::byte{0});
      size_t at = run_at;
      for (size_t part = run; part < last_run && plan.runs[part].begin < block.end; ++part) {
        const FileRange inside = plan.runs[part].Intersect(block);
        std::memcpy(&scratch[(inside.begin - block.begin).value],
                    &content[at + (inside.begin - plan.runs[part].begin).value],
                    inside.size().value);
        at += plan.runs[part].size().value;
      }
      bytes = scratch;
    }
    if (index_format::Checksum(bytes) != index.hashes[i]) return block.begin;
  }
  return std::nullopt;
}

// Hands places out in the order of the frames. After an error nobody waits any more.
class Places {
 public:
  explicit Places(uint64_t first) : next_place_(first) {}
  [[nodiscard]] std::optional<uint64_t> Take(size_t frame, uint64_t size) {
    std::unique_lock lock(mutex_);
    turn_.wait(lock, [&] { return next_frame_ == frame || closed_; });
    if (closed_) return std::nullopt;
    const uint64_t place = next_place_;
    next_place_ += size;
    ++next_frame_;
    turn_.notify_all();
    return place;
  }
  void Close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    turn_.notify_all();
  }
  [[nodiscard]] uint64_t end() const { return next_place_; }

 private:
  std::mutex mutex_;  // guards all below
  std::condition_variable turn_;
  size_t next_frame_ = 0;
  uint64_t next_place_;
  bool closed_ = false;
};

class Packer {
 public:
  Packer(const std::string& pages_path, const std::string& packed_path,
         const Compression& compression)
      : pages_path_(pages_path), packed_path_(packed_path), compression_(compression) {}

  [[nodiscard]] Result<PackedSize> Run(const std::string& index_path, const PackWork& work) {
    UNMOOR_ASSIGN(index_, ReadLayerIndex(index_path, nullptr));
    UNMOOR_ASSIGN(pages_, OpenFile(pages_path_, O_RDONLY | O_NOFOLLOW | O_NONBLOCK));
    UNMOOR_ASSIGN(const struct stat info, StatFd(pages_.get(), pages_path_));
    if (!S_ISREG(info.st_mode) || static_cast<uint64_t>(info.st_size) != index_.header.pages_size) {
      return UserError(
          "{} is damaged: it is not the file of {} bytes its index tells of; "
          "'unmoor verify' tells more",
          pages_path_, index_.header.pages_size);
    }
    UNMOOR_ASSIGN(packed_, OpenFile(packed_path_, O_RDWR | O_CREAT | O_EXCL, 0600));
    plan_ = packed_format::PlanFrames(index_);
    heads_.resize(plan_.frames.size());
    const packed_format::Header header{static_cast<uint32_t>(compression_.codec),
                                       compression_.level};
    UNMOOR_TRY(Write(packed_format::EncodeHeader(header, index_, heads_.size()), 0));
    Places places(packed_format::kHeaderSize);
    Crew crew(plan_.frames.size());
    UNMOOR_TRY(crew.Run(work.threads, Looking(work), [&](Crew& own) {
      Result<> result = PackFrames(own, places);
      if (!result) places.Close();
      return result;
    }));
    UNMOOR_TRY(FaultPoint("pack.table"));
    const auto table = packed_format::EncodeHeads(heads_);
    UNMOOR_TRY(Write(table, places.end()));
    UNMOOR_TRY(
        Write(packed_format::EncodeTrailer(table, places.end()), places.end() + table.size()));
    return PackedSize{Bytes(index_.header.data_bytes),
                      Bytes(places.end() + table.size() + packed_format::kTrailerSize)};
  }

 private:
  [[nodiscard]] Result<> Write(std::span<const std::byte> bytes, uint64_t place) const {
    return WriteExactlyAt(packed_.get(), bytes, FileOffset(place), packed_path_);
  }

  [[nodiscard]] Result<> PackFrames(Crew& crew, Places& places) {
    std::vector<std::byte> buffer(packed_format::kPieceSize);
    std::vector<std::byte> scratch;
    Compressor compressor(compression_);
    while (const auto number = crew.Next()) {
      const Frame& frame = plan_.frames[*number];
      const auto content = std::span(buffer).first(frame.content);
      size_t at = 0;
      for (size_t i = frame.first_run; i < frame.first_run + frame.run_count; ++i) {
        const size_t size = plan_.runs[i].size().value;
        UNMOOR_TRY(ReadExactlyAt(pages_.get(), content.subspan(at, size), plan_.runs[i].begin,
                                 pages_path_));
        at += size;
      }
      if (const auto damaged = FindDamagedBlock(index_, plan_, frame, content, scratch)) {
        return UserError(
            "{} is damaged: the 64 KiB at offset {} do not match their hash; nothing "
            "was packed",
            pages_path_, damaged->value);
      }
      UNMOOR_ASSIGN(const auto stored, compressor.Compress(content));
      UNMOOR_TRY(FaultPoint("pack.frame"));
      UNMOOR_TRY(Place(*number, stored, places));
      crew.Done(frame.content);
    }
    return {};
  }

  [[nodiscard]] Result<> Place(size_t number, std::span<const std::byte> stored, Places& places) {
    const auto place = places.Take(number, packed_format::kHeadSize + stored.size());
    if (!place) return {};  // another thread has failed and tells why
    FrameHead& head = heads_[number];
    head = {plan_.frames[number].piece, plan_.frames[number].content,
            static_cast<uint32_t>(stored.size()), index_format::Checksum(stored), *place};
    UNMOOR_TRY(Write(packed_format::EncodeHeads({&head, 1}), *place));
    return Write(stored, *place + packed_format::kHeadSize);
  }

  const std::string& pages_path_;
  const std::string& packed_path_;
  const Compression compression_;
  LayerIndex index_;
  FramePlan plan_;
  Fd pages_;
  Fd packed_;
  std::vector<FrameHead> heads_;  // each the thread's that has its frame
};

// Writes a frame's content where it belongs; pages of zeros stay holes.
Result<> WriteRuns(const FramePlan& plan, const Frame& frame, std::span<const std::byte> content,
                   WriteRing& ring) {
  size_t at = 0;
  for (size_t i = frame.first_run; i < frame.first_run + frame.run_count; ++i) {
    const FileRange& run = plan.runs[i];
    const auto bytes = content.subspan(at, run.size().value);
    at += bytes.size();
    for (size_t begin = 0; begin < bytes.size();) {
      if (IsZero(bytes.subspan(begin, kPageSize))) {
        begin += kPageSize;
        continue;
      }
      size_t end = begin + kPageSize;
      while (end < bytes.size() && !IsZero(bytes.subspan(end, kPageSize))) end += kPageSize;
      UNMOOR_TRY(ring.Write(bytes.subspan(begin, end - begin), run.begin + Bytes(begin)));
      begin = end;
    }
  }
  return {};
}

Damage DamageOf(const PackedReader& packed, size_t frame, const Error& error) {
  Damage damage;
  damage.file = packed.path();
  damage.bytes = packed.FileRangeOf(frame);
  damage.pages = packed.plan().frames[frame].range();
  damage.what = error.message();
  return damage;
}

}  // namespace

PackedSize PackedReader::size() const {
  return {Bytes(index_.header.data_bytes), file_size_};
}

Result<PackedReader> PackedReader::Open(const std::string& packed_path,
                                        const std::string& index_path,
                                        const ManifestLayer* expected) {
  UNMOOR_ASSIGN(LayerIndex index, ReadLayerIndex(index_path, expected));
  auto file = OpenFile(packed_path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
  if (!file && file.error().errnum() == ENOENT) return UserError("{} is missing", packed_path);
  if (!file) return Failure(std::move(file).error());
  return Open(std::move(*file), packed_path, std::move(index));
}

Result<PackedReader> PackedReader::Open(const std::string& dir, const ManifestLayer& entry) {
  return Open(LayerPackedPath(dir, entry.id), LayerIndexPath(dir, entry.id), &entry);
}

Result<PackedReader> PackedReader::Open(Fd file, const std::string& name, LayerIndex index) {
  PackedReader reader;
  UNMOOR_TRY(reader.Load(std::move(file), name, std::move(index)));
  return reader;
}

Result<> PackedReader::Load(Fd file, const std::string& name, LayerIndex index) {
  path_ = name;
  file_ = std::move(file);
  index_ = std::move(index);
  plan_ = packed_format::PlanFrames(index_);
  UNMOOR_ASSIGN(const struct stat info, StatFd(file_.get(), path_));
  if (!S_ISREG(info.st_mode)) return UserError("{} is not a regular file", path_);
  file_size_ = Bytes(static_cast<uint64_t>(info.st_size));
  const size_t frames = plan_.frames.size();
  if (file_size_.value < packed_format::kHeaderSize + packed_format::kTrailerSize) {
    return UserError("{} is truncated: {} bytes", path_, file_size_.value);
  }
  std::vector<std::byte> bytes(packed_format::kHeaderSize);
  UNMOOR_TRY(ReadExactlyAt(file_.get(), bytes, FileOffset(0), path_));
  UNMOOR_ASSIGN(const packed_format::Header header,
                packed_format::DecodeHeader(bytes, index_, frames, path_));
  if (header.codec != static_cast<uint32_t>(Codec::kLz4) &&
      header.codec != static_cast<uint32_t>(Codec::kZstd)) {
    return UserError("{} is packed in a way (codec {}) this unmoor does not know", path_,
                     header.codec);
  }
  compression_ = {static_cast<Codec>(header.codec), header.level};
  std::vector<std::byte> trailer(packed_format::kTrailerSize);
  UNMOOR_TRY(ReadExactlyAt(file_.get(), trailer,
                           FileOffset(file_size_.value - packed_format::kTrailerSize), path_));
  UNMOOR_ASSIGN(const uint64_t place,
                packed_format::DecodeTrailer(trailer, file_size_.value, frames, path_));
  bytes.resize(frames * packed_format::kHeadSize);
  UNMOOR_TRY(ReadExactlyAt(file_.get(), bytes, FileOffset(place), path_));
  UNMOOR_ASSIGN(heads_, packed_format::DecodeTable(bytes, trailer, plan_, path_));
  return {};
}

FileRange PackedReader::FileRangeOf(size_t frame) const {
  const FrameHead& head = heads_[frame];
  const FileOffset begin(head.place);
  return {begin, begin + Bytes(packed_format::kHeadSize + head.stored)};
}

std::optional<size_t> PackedReader::FindFrame(FileOffset at) const {
  const uint64_t piece = at.value / packed_format::kPieceSize;
  const auto frame = std::ranges::lower_bound(plan_.frames, piece, {}, &Frame::piece);
  if (frame == plan_.frames.end() || frame->piece != piece) return std::nullopt;
  return static_cast<size_t>(frame - plan_.frames.begin());
}

Result<std::span<const std::byte>> PackedReader::ReadStored(size_t frame,
                                                            std::vector<std::byte>& buffer) const {
  const FrameHead& head = heads_[frame];
  buffer.resize(packed_format::kHeadSize + head.stored);
  UNMOOR_TRY(ReadExactlyAt(file_.get(), buffer, FileOffset(head.place), path_));
  const auto expected = packed_format::EncodeHeads({&head, 1});
  if (!std::equal(expected.begin(), expected.end(), buffer.begin())) {
    return UserError("{} is damaged at offset {}: the head of a frame is not the table's", path_,
                     head.place);
  }
  const auto stored = std::span<const std::byte>(buffer).subspan(packed_format::kHeadSize);
  if (index_format::Checksum(stored) != head.checksum) {
    return UserError("{} is damaged: the {} bytes at offset {} do not match their checksum", path_,
                     head.stored, head.place + packed_format::kHeadSize);
  }
  return stored;
}

Result<> PackedReader::Expand(size_t frame, std::span<const std::byte> stored,
                              Decompressor& decompressor, std::span<std::byte> content) const {
  UNMOOR_CHECK(content.size() == plan_.frames[frame].content);
  const uint64_t at = heads_[frame].place + packed_format::kHeadSize;
  if (!decompressor.Decompress(compression_.codec, stored, content)) {
    return UserError("{} is damaged: the frame at offset {} cannot be decompressed", path_, at);
  }
  std::vector<std::byte> scratch;
  if (const auto damaged = FindDamagedBlock(index_, plan_, plan_.frames[frame], content, scratch)) {
    return UserError(
        "{} is damaged: the frame at offset {} does not hold the 64 KiB at {} of the "
        "pages, as their hash tells",
        path_, at, damaged->value);
  }
  return {};
}

Result<PackedSize> PackLayer(const std::string& pages_path, const std::string& index_path,
                             const std::string& packed_path, const Compression& compression,
                             const PackWork& work) {
  return Packer(pages_path, packed_path, compression).Run(index_path, work);
}

Result<> UnpackLayer(const PackedReader& packed, const std::string& pages_path,
                     bool start_write_back, const PackWork& work) {
  UNMOOR_ASSIGN(const Fd pages, OpenFile(pages_path, O_RDWR | O_CREAT | O_EXCL, 0600));
  UNMOOR_TRY(Truncate(pages.get(), Bytes(packed.index().header.pages_size), pages_path));
  const FramePlan& plan = packed.plan();
  Crew crew(plan.frames.size());
  UNMOOR_TRY(crew.Run(work.threads, Looking(work), [&](Crew& own) -> Result<> {
    UNMOOR_ASSIGN(WriteRing ring,
                  WriteRing::Create(pages.get(), pages_path, packed_format::kPieceSize, kBuffers));
    Decompressor decompressor;
    std::vector<std::byte> stored_buffer;
    while (const auto number = own.Next()) {
      const Frame& frame = plan.frames[*number];
      UNMOOR_ASSIGN(const auto stored, packed.ReadStored(*number, stored_buffer));
      UNMOOR_ASSIGN(const auto buffer, ring.Take());
      const auto content = buffer.first(frame.content);
      UNMOOR_TRY(packed.Expand(*number, stored, decompressor, content));
      UNMOOR_TRY(FaultPoint("unpack.frame"));
      UNMOOR_TRY(WriteRuns(plan, frame, content, ring));
      if (start_write_back) {
        StartWriteback(pages.get(), frame.range().begin, frame.range().size());
      }
      own.Done(frame.content);
    }
    return ring.Finish();
  }));
  return FaultPoint("unpack.end");
}

LayerVerdict VerifyPackedLayer(const std::string& dir, const std::string& id,
                               const ManifestLayer* expected, bool deep,
                               const VerifyOptions& options) {
  LayerVerdict verdict;
  const std::string index_path = LayerIndexPath(dir, id);
  const std::string packed_path = LayerPackedPath(dir, id);
  const auto tell = [&](const std::string& file, const Error& error) {
    verdict.damages.push_back({file, std::nullopt, error.message(), {}});
  };
  auto index = ReadLayerIndex(index_path, expected);
  if (!index) {
    tell(index_path, index.error());
    return verdict;
  }
  verdict.index = *index;
  const auto packed = PackedReader::Open(packed_path, index_path, expected);
  if (!packed) {
    tell(packed_path, packed.error());
    return verdict;
  }
  if (!options.pages) return verdict;
  std::mutex mutex;
  Crew crew(packed->plan().frames.size());
  const PackWork work{options.threads, options.progress};
  const auto ran = crew.Run(work.threads, Looking(work), [&](Crew& own) -> Result<> {
    Decompressor decompressor;
    std::vector<std::byte> stored_buffer;
    std::vector<std::byte> content(packed_format::kPieceSize);
    while (const auto number = own.Next()) {
      const Frame& frame = packed->plan().frames[*number];
      const auto stored = packed->ReadStored(*number, stored_buffer);
      Result<> sound;
      if (!stored) {
        sound = Failure(stored.error());
      } else if (deep) {
        sound =
            packed->Expand(*number, *stored, decompressor, std::span(content).first(frame.content));
      }
      own.Done(frame.content);
      const std::lock_guard lock(mutex);
      verdict.checked += Bytes(frame.content);
      if (!sound) verdict.damages.push_back(DamageOf(*packed, *number, sound.error()));
    }
    return {};
  });
  if (!ran) tell(packed_path, ran.error());
  std::ranges::sort(verdict.damages, {}, [](const Damage& damage) {
    return damage.bytes ? damage.bytes->begin : FileOffset(0);
  });
  return verdict;
}

}  // namespace unmoor
