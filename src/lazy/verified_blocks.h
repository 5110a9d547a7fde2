// VerifiedBlocks: the pages of layers, each block held against its hash before anybody sees it.
//
// One thread uses it; others, once started, read ahead what it says it will need, as far as there
// is a processor for them (SCHED_IDLE): a block they have not read yet is read when it is asked for.
// What they have read are copies of ours, so what was checked is what goes in, whatever becomes of
// the file. A block that cannot be read whole, or does not match, is an error that names the file and
// the offset; never zeros. Document: docs/format.md, "Hash".
//
// A place for a block read ahead:
//
//   owner    free ──▶ wanted ──▶ free                  there, failed ──▶ free
//   reader             wanted ──▶ reading ──▶ there, failed
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer_reader.h"
#include "os/fd.h"

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
  static constexpr size_t kAhead = 32;

  // Their hashes are loaded.
  explicit VerifiedBlocks(const std::vector<LayerReader>& layers);
  VerifiedBlocks(const VerifiedBlocks&) = delete;
  VerifiedBlocks& operator=(const VerifiedBlocks&) = delete;
  ~VerifiedBlocks() { StopReaders(); }

  // The owner stops them before it forks: what they hold would be held for ever in a child.
  [[nodiscard]] Result<> StartReaders();
  void StopReaders();

  // The 64 KiB block that holds `at`; until the next call.
  [[nodiscard]] Result<std::span<const std::byte>> Block(uint32_t layer, FileOffset at);
  // What will be asked for next, in that order; at most kAhead of them. What else was read ahead is
  // forgotten.
  void Expect(std::span<const BlockName> blocks);
  [[nodiscard]] bool IsReadAhead(BlockName block);

 private:
  enum class State : uint32_t { kFree, kWanted, kReading, kThere, kFailed };
  struct Place {
    std::atomic<State> state = State::kFree;
    std::atomic<uint64_t> turn = 0;  // the wanted one with the least is read next
    BlockName name;                  // the owner's to set while free
  };

  [[nodiscard]] Result<> Read(BlockName block, std::span<std::byte> into) const;
  [[nodiscard]] std::span<std::byte> At(const Place& place);
  [[nodiscard]] Place* FindPlace(BlockName block);
  void ReadAhead();
  [[nodiscard]] Place* TakeWanted();

  const std::vector<LayerReader>& layers_;
  std::vector<std::byte> block_;
  // What is in it, if anything.
  std::optional<BlockName> held_;

  Mapping ahead_;
  std::array<Place, kAhead> places_;
  uint64_t turns_ = 0;
  std::atomic<uint32_t> calls_ = 0;  // readers wait for it to change
  std::atomic<bool> stop_ = false;
  std::vector<std::thread> readers_;
};

}  // namespace unmoor
