// See verified_blocks.h.
#include "lazy/verified_blocks.h"

#include <algorithm>

#include "image/layout.h"
#include "os/file.h"
#include "os/own_process.h"

namespace unmoor {
namespace {

constexpr unsigned kMostReaders = 3;

}  // namespace

BlockName BlockAt(uint32_t layer, FileOffset at) {
  return {layer, FileOffset(AlignDown(at.value, kBlockSize))};
}

VerifiedBlocks::VerifiedBlocks(const std::vector<LayerReader>& layers)
    : layers_(layers), block_(kBlockSize) {}

Result<> VerifiedBlocks::StartReaders() {
  UNMOOR_ASSIGN(ahead_, Mapping::Anonymous(kAhead * kBlockSize));
  stop_ = false;
  const unsigned count = std::clamp(std::thread::hardware_concurrency(), 2u, kMostReaders + 1) - 1;
  for (unsigned i = 0; i < count; ++i) {
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

Result<> VerifiedBlocks::Read(BlockName block, std::span<std::byte> into) const {
  const LayerReader& reader = layers_[block.layer];
  UNMOOR_TRY(ReadExactlyAt(reader.pages_fd().get(), into, block.begin, reader.pages_path()));
  return reader.CheckBlock(block.begin, into);
}

Result<std::span<const std::byte>> VerifiedBlocks::Block(uint32_t layer, FileOffset at) {
  const BlockName block = BlockAt(layer, at);
  if (held_ == block) return std::span<const std::byte>(block_);
  if (Place* const place = FindPlace(block)) {
    if (place->state.load(std::memory_order_acquire) == State::kThere) return At(*place);
    State wanted = State::kWanted;  // not any more
    place->state.compare_exchange_strong(wanted, State::kFree);
  }
  held_.reset();
  UNMOOR_TRY(Read(block, block_));
  held_ = block;
  return std::span<const std::byte>(block_);
}

void VerifiedBlocks::Expect(std::span<const BlockName> blocks) {
  if (readers_.empty()) return;
  for (Place& place : places_) {
    if (std::ranges::find(blocks, place.name) != blocks.end()) continue;
    State state = place.state.load(std::memory_order_acquire);
    if (state != State::kReading) place.state.compare_exchange_strong(state, State::kFree);
  }
  bool more = false;
  for (const BlockName& block : blocks) {
    if (held_ == block || FindPlace(block) != nullptr) continue;
    const auto free = std::ranges::find_if(
        places_, [](const Place& place) { return place.state.load() == State::kFree; });
    if (free == places_.end()) break;
    free->name = block;
    free->turn = ++turns_;
    free->state.store(State::kWanted, std::memory_order_release);
    more = true;
  }
  if (!more) return;
  ++calls_;
  calls_.notify_all();
}

bool VerifiedBlocks::IsReadAhead(BlockName block) {
  const Place* const place = FindPlace(block);
  return place != nullptr && place->state.load(std::memory_order_acquire) == State::kThere;
}

std::span<std::byte> VerifiedBlocks::At(const Place& place) {
  const auto index = static_cast<size_t>(&place - places_.data());
  return ahead_.writable_bytes().subspan(index * kBlockSize, kBlockSize);
}

VerifiedBlocks::Place* VerifiedBlocks::FindPlace(BlockName block) {
  const auto place = std::ranges::find_if(places_, [&](const Place& one) {
    return one.name == block && one.state.load() != State::kFree;
  });
  return place == places_.end() ? nullptr : &*place;
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
  while (!stop_) {
    const uint32_t calls = calls_;
    Place* const place = TakeWanted();
    if (place == nullptr) {
      calls_.wait(calls);
      continue;
    }
    State wanted = State::kWanted;
    if (!place->state.compare_exchange_strong(wanted, State::kReading)) continue;
    const bool read = Read(place->name, At(*place)).has_value();
    place->state.store(read ? State::kThere : State::kFailed, std::memory_order_release);
  }
}

}  // namespace unmoor
