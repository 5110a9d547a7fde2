// See verified_blocks.h.
#include "lazy/verified_blocks.h"

#include <algorithm>

#include "image/layout.h"
#include "os/own_process.h"
#include "os/process_control.h"

namespace unmoor {
namespace {

constexpr unsigned kMostReaders = 3;
constexpr Nanos kPatience(5'000'000);  // some frames' worth, if readers run at all

bool IsIn(BlockName piece, std::span<const BlockName> pieces) {
  return std::ranges::find(pieces, piece) != pieces.end();
}

}  // namespace

BlockName BlockAt(uint32_t layer, FileOffset at) {
  return {layer, FileOffset(AlignDown(at.value, kBlockSize))};
}

VerifiedBlocks::VerifiedBlocks(const LayerSources& layers) : layers_(layers) {
  const auto is_packed = [](const auto& layer) { return layer->piece_size() > kBlockSize; };
  has_packed_ = std::ranges::any_of(layers, is_packed);
  AddPlaces(kBlocks, kBlockSize);
  if (has_packed_) AddPlaces(kFrames, kHugePageSize);
}

void VerifiedBlocks::AddPlaces(size_t count, size_t size) {
  memory_.push_back(std::make_unique_for_overwrite<std::byte[]>(count * size));
  const std::span<std::byte> memory(memory_.back().get(), count * size);
  for (size_t i = 0; i < count; ++i) places_.emplace_back().bytes = memory.subspan(i * size, size);
}

// For frames as many as there are processors: reading them is most of the work, and the owner, who
// needs one when it has something to do, is always preferred.
Result<> VerifiedBlocks::StartReaders() {
  stop_ = false;
  const unsigned processors = std::max(1u, std::thread::hardware_concurrency());
  const unsigned wanted = has_packed_ ? processors : std::max(processors, 2u) - 1;
  for (unsigned i = 0; i < std::min(wanted, kMostReaders); ++i) {
    UNMOOR_ASSIGN(std::thread reader, StartQuietThread("unmoor-ahead", [this] { ReadAhead(); }));
    RunOnlyWhenIdle(reader, true);
    readers_.push_back(std::move(reader));
  }
  return {};
}

void VerifiedBlocks::StopReaders() {
  stop_ = true;
  ++calls_;
  calls_.notify_all();
  for (std::thread& reader : readers_) {
    RunOnlyWhenIdle(reader, false);  // else it may not get to its end for long
    reader.join();
  }
  readers_.clear();
  for (Place& place : places_) place.state = State::kFree;
}

BlockName VerifiedBlocks::PieceOf(BlockName block) const {
  return {block.layer, FileOffset(AlignDown(block.begin.value, PieceSize(block.layer)))};
}

// Each once; no more than there are places for.
std::vector<BlockName> VerifiedBlocks::PiecesOf(std::span<const BlockName> blocks) const {
  std::vector<BlockName> pieces;
  for (const BlockName& block : blocks) {
    const BlockName piece = PieceOf(block);
    if (pieces.size() < places_.size() && !IsIn(piece, pieces)) pieces.push_back(piece);
  }
  return pieces;
}

size_t VerifiedBlocks::ahead() const {
  return has_packed_ ? kFrames * kHugePageSize / kBlockSize : kBlocks;
}

Result<std::span<const std::byte>> VerifiedBlocks::Block(uint32_t layer, FileOffset at) {
  const BlockName block = BlockAt(layer, at);
  const BlockName piece = PieceOf(block);
  if (last_ != piece) ++asked_;
  last_ = piece;
  Place* place = FindPlace(piece);
  if (place == nullptr || place->state.load(std::memory_order_acquire) != State::kThere) {
    UNMOOR_ASSIGN(place, ReadNow(piece));
  }
  place->turn = ++turns_;
  return place->bytes.subspan((block.begin - piece.begin).value, kBlockSize);
}

Result<VerifiedBlocks::Place*> VerifiedBlocks::ReadNow(BlockName piece) {
  if (Place* const place = FindPlace(piece)) {
    State wanted = State::kWanted;  // not any more
    place->state.compare_exchange_strong(wanted, State::kFree);
  }
  // There is one: readers hold fewer than there are.
  Place* const place = MakePlace(piece, {});
  UNMOOR_TRY(layers_[piece.layer]->ReadPiece(piece.begin, place->bytes, scratch_));
  place->name = piece;
  place->state = State::kThere;
  return place;
}

void VerifiedBlocks::Expect(std::span<const BlockName> blocks) {
  const std::vector<BlockName> pieces = PiecesOf(blocks);
  expected_ = pieces.size();
  asked_ = 0;
  if (readers_.empty()) return;
  for (Place& place : places_) {
    State wanted = State::kWanted;
    if (!IsIn(place.name, pieces)) place.state.compare_exchange_strong(wanted, State::kFree);
  }
  bool more = false;
  for (const BlockName& piece : pieces) {
    if (FindPlace(piece) != nullptr) continue;
    Place* const place = MakePlace(piece, pieces);
    if (place == nullptr) continue;
    place->name = piece;
    place->turn = ++turns_;
    place->state.store(State::kWanted, std::memory_order_release);
    more = true;
  }
  if (!more) return;
  ++calls_;
  calls_.notify_all();
}

bool VerifiedBlocks::IsReadAhead(BlockName block) {
  const Place* const place = FindPlace(PieceOf(block));
  return place != nullptr && place->state.load(std::memory_order_acquire) == State::kThere;
}

bool VerifiedBlocks::IsComing(BlockName block) {
  if (readers_.empty() || PieceSize(block.layer) == kBlockSize) return false;
  const BlockName piece = PieceOf(block);
  const Place* const place = FindPlace(piece);
  if (place == nullptr) return false;
  const State state = place->state.load(std::memory_order_acquire);
  if (state != State::kWanted && state != State::kReading) return false;
  const uint64_t read = read_ahead_;
  const Nanos now = MonotonicNow();
  if (read != patience_.read || (patience_.piece != piece && !patience_.exhausted)) {
    patience_ = {piece, now, read, false};
  }
  if (now - patience_.since > kPatience) patience_.exhausted = true;
  return !patience_.exhausted;
}

VerifiedBlocks::Place* VerifiedBlocks::FindPlace(BlockName piece) {
  Place* found = nullptr;
  for (Place& place : places_) {
    const State state = place.state.load(std::memory_order_acquire);
    if (state == State::kFree || place.name != piece) continue;
    if (state == State::kThere) return &place;
    found = &place;
  }
  return found;
}

VerifiedBlocks::Place* VerifiedBlocks::MakePlace(BlockName piece, std::span<const BlockName> keep) {
  for (;;) {
    Place* least = nullptr;
    for (Place& place : places_) {
      const State state = place.state.load(std::memory_order_acquire);
      if (place.bytes.size() != PieceSize(piece.layer) || state == State::kReading) continue;
      if (state == State::kFree) return &place;
      if (IsIn(place.name, keep)) continue;
      if (least == nullptr || place.turn.load() < least->turn.load()) least = &place;
    }
    if (least == nullptr) return nullptr;
    State state = least->state.load(std::memory_order_acquire);
    if (state != State::kReading && least->state.compare_exchange_strong(state, State::kFree)) {
      return least;
    }
  }
}

// --- the readers ---------------------------------------------------------------------------------

VerifiedBlocks::Place* VerifiedBlocks::TakeWanted() {
  Place* next = nullptr;
  for (Place& place : places_) {
    const bool wanted = place.state.load(std::memory_order_acquire) == State::kWanted;
    if (wanted && (next == nullptr || place.turn.load() < next->turn.load())) next = &place;
  }
  return next;
}

// One that cannot be read is read again by whoever asks for it, who then says why.
void VerifiedBlocks::ReadAhead() {
  LayerSource::Scratch scratch;
  while (!stop_) {
    const uint32_t calls = calls_;
    Place* const place = TakeWanted();
    if (place == nullptr) {
      calls_.wait(calls);
      continue;
    }
    State wanted = State::kWanted;
    if (!place->state.compare_exchange_strong(wanted, State::kReading)) continue;
    const BlockName piece = place->name;
    const auto read = layers_[piece.layer]->ReadPiece(piece.begin, place->bytes, scratch);
    ++read_ahead_;
    place->state.store(read ? State::kThere : State::kFailed, std::memory_order_release);
  }
}

}  // namespace unmoor
