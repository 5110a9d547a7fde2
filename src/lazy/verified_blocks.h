// VerifiedBlocks: the pages of layers, each block held against its hash before anybody sees it.
//
// One thread uses it; others, once started, read ahead what it says it will need, as far as there
// is a processor for them (SCHED_IDLE): what they have not read yet is read when it is asked for.
// What was read are copies of ours, so what was checked is what goes in, whatever becomes of
// the file. What cannot be read whole, or does not match, is an error that names the file and
// the offset; never zeros. Document: docs/format.md, "Hash".
//
// Layers are read in their pieces (image/layer_source.h): a block of a plain one, a frame of a
// packed one. A piece has a place of its size, kBlocks and kFrames in all (2 and 16 MiB), which it
// keeps until room is needed and it is the one that was wanted least recently.
//
//   owner    free ──▶ wanted ──▶ free      free ──▶ there, as it reads itself
//            there, failed ──▶ free
//   reader             wanted ──▶ reading ──▶ there, failed
//
// A block is read in less time than it takes to look whether somebody else does. A frame is not:
// nobody decompresses one that a reader is at, unless somebody waits for it or the readers get no
// processor (IsComing).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer_source.h"

namespace unmoor {

// A block of a layer.
struct BlockName {
  uint32_t layer = 0;
  FileOffset begin;  // a multiple of its size
  bool operator==(const BlockName&) const = default;
};
// The one that holds `at`.
[[nodiscard]] BlockName BlockAt(uint32_t layer, FileOffset at);

class VerifiedBlocks {
 public:
  static constexpr size_t kBlocks = 32;
  static constexpr size_t kFrames = 8;

  // Their hashes are loaded.
  explicit VerifiedBlocks(const LayerSources& layers);
  VerifiedBlocks(const VerifiedBlocks&) = delete;
  VerifiedBlocks& operator=(const VerifiedBlocks&) = delete;
  ~VerifiedBlocks() { StopReaders(); }

  // The owner stops them before it forks: what they hold would be held for ever in a child.
  [[nodiscard]] Result<> StartReaders();
  void StopReaders();

  // The 64 KiB block that holds `at`; until the next call.
  [[nodiscard]] Result<std::span<const std::byte>> Block(uint32_t layer, FileOffset at);
  // What will be asked for next, in that order; so many of them as there are places for. What else
  // was to be read ahead is not.
  void Expect(std::span<const BlockName> blocks);
  // Enough of that has been asked for since that it should be told again.
  [[nodiscard]] bool ShouldExpect() const { return 2 * asked_ >= expected_; }
  // How many blocks say all that can be expected, if they follow one another.
  [[nodiscard]] size_t ahead() const;
  [[nodiscard]] bool IsReadAhead(BlockName block);
  // It is being read, and by others as soon as by us: who is in no hurry looks again a little
  // later.
  [[nodiscard]] bool IsComing(BlockName block);
  // The bytes of the layer around `at` that are read, and so at hand, together.
  [[nodiscard]] uint64_t PieceSize(uint32_t layer) const { return layers_[layer]->piece_size(); }

 private:
  enum class State : uint32_t { kFree, kWanted, kReading, kThere, kFailed };
  struct Place {
    std::span<std::byte> bytes;
    std::atomic<State> state = State::kFree;
    // When it was wanted: the wanted one with the least is read next.
    std::atomic<uint64_t> turn = 0;
    BlockName name;  // of the piece; the owner's to set while free
  };
  // Of the owner's waiting for readers.
  struct Patience {
    BlockName piece;
    Nanos since;
    uint64_t read = 0;       // by readers, when that began
    bool exhausted = false;  // since then they have read nothing
  };

  [[nodiscard]] BlockName PieceOf(BlockName block) const;
  [[nodiscard]] std::vector<BlockName> PiecesOf(std::span<const BlockName> blocks) const;
  void AddPlaces(size_t count, size_t size);
  [[nodiscard]] Place* FindPlace(BlockName piece);
  // A free one for it, taken from another if need be but from none of `keep`.
  [[nodiscard]] Place* MakePlace(BlockName piece, std::span<const BlockName> keep);
  [[nodiscard]] Result<Place*> ReadNow(BlockName piece);
  void ReadAhead();
  [[nodiscard]] Place* TakeWanted();

  const LayerSources& layers_;
  bool has_packed_ = false;
  // Of the places; not touched before it is used.
  std::vector<std::unique_ptr<std::byte[]>> memory_;
  std::deque<Place> places_;
  LayerSource::Scratch scratch_;  // the owner's
  uint64_t turns_ = 0;
  size_t expected_ = 0;  // pieces
  size_t asked_ = 0;
  std::optional<BlockName> last_;  // piece asked for
  Patience patience_;

  std::atomic<uint64_t> read_ahead_ = 0;  // pieces
  std::atomic<uint32_t> calls_ = 0;       // readers wait for it to change
  std::atomic<bool> stop_ = false;
  std::vector<std::thread> readers_;
};

}  // namespace unmoor
