// See remapper.h.
#include "remap/remapper.h"

#include <algorithm>
#include <cerrno>

namespace unmoor {
namespace {

constexpr Bytes kFirstBatch(uint64_t{16} << 20);
constexpr Bytes kLargestBatch(uint64_t{32} << 20);
constexpr Bytes kCopyChunk(uint64_t{8} << 20);   // between two looks at the program's events
constexpr Bytes kPieceSpan(uint64_t{4} << 30);   // address space swapped at once
constexpr size_t kPiecesPerBatch = 16;
constexpr int kRefreshRounds = 4;
constexpr int kFruitlessPlans = 300;  // with the pauses between them, some ten seconds

// A list of mappings read while the program changes them may name memory twice; swapped twice, it
// would be empty.
bool AnyOverlap(std::span<const Carrier::PlannedArea> areas) {
  std::vector<VaddrRange> ranges;
  for (const Carrier::PlannedArea& planned : areas) ranges.push_back(planned.area.range);
  std::ranges::sort(ranges, {}, &VaddrRange::begin);
  return std::ranges::adjacent_find(
             ranges, [](VaddrRange a, VaddrRange b) { return a.Overlaps(b); }) != ranges.end();
}

}  // namespace

Remapper::Remapper(Carrier& carrier, Nanos max_pause, bool huge_pages)
    : carrier_(carrier), pacer_(max_pause, kFirstBatch, kLargestBatch), huge_pages_(huge_pages) {}

Result<> Remapper::Run(const std::function<void(const RemapCounts&)>& progress) {
  int fruitless = 0;
  while (fruitless < kFruitlessPlans) {
    const uint64_t windows = counts_.windows;
    UNMOOR_ASSIGN(const bool finished, RunPlan(progress));
    if (finished) return {};
    fruitless = counts_.windows > windows ? 0 : fruitless + 1;
    carrier_.Pause(
        Nanos(std::min<int64_t>(100'000 * (int64_t{1} << std::min(fruitless, 9)), 50'000'000)));
  }
  return MachineError("the program changes its mappings faster than they can be remapped");
}

// True when everything in the plan was swapped, false when it must be made anew.
Result<bool> Remapper::RunPlan(const std::function<void(const RemapCounts&)>& progress) {
  UNMOOR_TRY(carrier_.HandleEvents());
  UNMOOR_ASSIGN(areas_, carrier_.Plan());
  if (areas_.empty()) return true;
  if (AnyOverlap(areas_)) return false;
  todo_.clear();
  Bytes left;
  for (size_t i = areas_.size(); i-- > 0;) {
    todo_.push_back({i, areas_[i].area.range});
    left += areas_[i].image_data.SizeWithin(areas_[i].area.range);
  }
  counts_.total = counts_.done + left;
  progress(counts_);
  while (!todo_.empty()) {
    std::vector<Piece> batch = TakeBatch();
    UNMOOR_ASSIGN(Next next, CopyBatch(batch));
    if (next == Next::kContinue) {
      UNMOOR_ASSIGN(next, SwapBatch(std::move(batch)));
    }
    if (next == Next::kReplan) return false;
    progress(counts_);
  }
  return false;  // look once more: mremap may have moved something meanwhile
}

// Whole blocks, about as many bytes of content as the pacer allows; a small area always at once.
std::vector<Piece> Remapper::TakeBatch() {
  std::vector<Piece> batch;
  Bytes content;
  while (!todo_.empty() && content < pacer_.batch_size() && batch.size() < kPiecesPerBatch) {
    Piece& next = todo_.back();
    Piece piece{next.area, {next.range.begin, next.range.begin}};
    const bool whole = IsSmallArea(next);
    for (const VaddrRange block : CutIntoBlocks(
             {next.range.begin, std::min(next.range.end, next.range.begin + kPieceSpan)})) {
      piece.range.end = block.end;
      content += areas_[next.area].image_data.SizeWithin(block);
      if (content >= pacer_.batch_size() && !whole) break;
    }
    next.range.begin = piece.range.end;
    batch.push_back(piece);
    if (next.range.empty()) todo_.pop_back();
  }
  return batch;
}

Result<Remapper::Next> Remapper::CopyBatch(std::vector<Piece>& batch) {
  Bytes freed;
  for (size_t i = 0; i < batch.size(); ++i) {
    // The baseline first: whatever is written from here on shows in the recheck.
    UNMOOR_ASSIGN(const std::vector<VaddrRange> ranges, carrier_.OwnPages(batch[i].range, false));
    RangeSet own;
    for (const VaddrRange range : ranges) own.Insert(range);
    const auto cut = WhereTooMuchIsFreed(batch[i], own, i == 0, freed);
    if (cut) {
      GiveBack(std::span(batch).subspan(i + 1));
      GiveBackFrom(*cut, batch[i]);
      batch.resize(batch[i].range.empty() ? i : i + 1);
      if (batch.size() == i) break;
    }
    UNMOOR_ASSIGN(const Next next, CopyPiece(batch[i], own));
    if (next == Next::kReplan) return next;
  }
  return Next::kContinue;
}

// An area that is anonymous in part is two VMAs for the time being, which the program notices:
// mremap of all of it fails. So a small one is cut only where it is too hot to be swapped
// otherwise.
bool Remapper::IsSmallArea(const Piece& piece) const {
  return areas_[piece.area].area.range == piece.range && piece.range.size() <= kWholeArea;
}

// Swapping frees the pages it replaces, while everybody waits. `freed`: by the pieces before. The
// first block of a batch is never too much, nor the first piece where that is a small area.
std::optional<Vaddr> Remapper::WhereTooMuchIsFreed(const Piece& piece, const RangeSet& own,
                                                   bool is_first, Bytes& freed) const {
  const bool small = IsSmallArea(piece);
  for (const VaddrRange block : CutIntoBlocks(piece.range)) {
    freed += own.SizeWithin(block);
    const bool may_stay = is_first && (small || block.begin == piece.range.begin);
    if (freed > pacer_.freed_limit() && !may_stay) {
      return small ? piece.range.begin : block.begin;
    }
  }
  return std::nullopt;
}

Result<Remapper::Next> Remapper::CopyPiece(const Piece& piece, const RangeSet& own) {
  std::vector<CopyStep> steps;
  Bytes size;
  const auto flush = [&]() -> Result<bool> {
    if (!steps.empty()) UNMOOR_TRY(carrier_.Copy(piece.area, steps));
    steps.clear();
    size = Bytes(0);
    return carrier_.HandleEvents();
  };
  for (const VaddrRange block : CutIntoBlocks(piece.range)) {
    BlockContent content = ContentOf(block, areas_[piece.area].image_data, own, carrier_.dropped());
    if (content.size().value == 0) continue;
    size += content.size();
    const bool huge = huge_pages_ && content.IsFullBlock(block);
    steps.push_back({block, std::move(content), huge});
    if (size < kCopyChunk) continue;
    UNMOOR_ASSIGN(const bool changed, flush());
    if (changed) return Next::kReplan;
  }
  UNMOOR_ASSIGN(const bool changed, flush());
  return changed ? Next::kReplan : Next::kContinue;
}

// Copies again, unguarded, what was written since. Returns how much that was.
Result<PageCount> Remapper::RefreshBatch(std::span<const Piece> batch) {
  PageCount written;
  for (const Piece& piece : batch) {
    UNMOOR_ASSIGN(const std::vector<VaddrRange> pages, carrier_.OwnPages(piece.range, true));
    for (const VaddrRange r : pages) written += ToPages(r.size());
    if (!pages.empty()) UNMOOR_TRY(carrier_.CopyAgain(piece.area, pages));
  }
  return written;
}

Result<Remapper::Next> Remapper::SwapBatch(std::vector<Piece> batch) {
  Nanos backoff(200'000);
  for (;;) {
    PageCount last(~uint64_t{0});
    PageCount freed;  // what was written since it was copied, by the swap
    for (int round = 0; round < kRefreshRounds; ++round) {
      UNMOOR_ASSIGN(const PageCount written, RefreshBatch(batch));
      freed = std::max(freed, written);
      const bool settled = written.value * 4 <= pacer_.dirty_limit().value;
      if (settled || written.value * 4 > last.value * 3) break;  // no longer shrinking
      last = written;
    }
    UNMOOR_ASSIGN(const bool changed, carrier_.HandleEvents());
    if (changed) return Next::kReplan;
    const bool too_much = ToBytes(freed) > pacer_.freed_limit();
    const bool may_cut = batch.size() > 1 || !IsSmallArea(batch[0]);
    if (too_much && may_cut && KeepHalf(batch)) continue;
    UNMOOR_ASSIGN(const SwapOutcome outcome, carrier_.Swap(batch, pacer_.dirty_limit()));
    counts_.longest_pause = std::max(counts_.longest_pause, outcome.pause);
    if (outcome.result == SwapResult::kSwapped) {
      ++counts_.windows;
      CountSwapped(batch);
      pacer_.Swapped(outcome.pause);
      return Next::kContinue;
    }
    ++counts_.aborted;
    if (outcome.result == SwapResult::kStale) return Next::kReplan;
    if (outcome.result == SwapResult::kTooDirty) {
      pacer_.TooDirty();
      (void)KeepHalf(batch);
      continue;
    }
    carrier_.Pause(backoff);
    backoff = std::min(Nanos(backoff.value * 2), Nanos(5'000'000));
    UNMOOR_ASSIGN(const bool changed_now, carrier_.HandleEvents());
    if (changed_now) return Next::kReplan;
  }
}

// The rest is copied anew when its turn comes. False where a single block is left.
bool Remapper::KeepHalf(std::vector<Piece>& batch) {
  if (batch.size() > 1) {
    GiveBack(std::span(batch).subspan(batch.size() / 2));
    batch.resize(batch.size() / 2);
    return true;
  }
  const auto blocks = CutIntoBlocks(batch[0].range);
  if (blocks.size() == 1) return false;
  GiveBackFrom(blocks[blocks.size() / 2].begin, batch[0]);
  return true;
}

void Remapper::GiveBackFrom(Vaddr cut, Piece& piece) {
  todo_.push_back({piece.area, {cut, piece.range.end}});
  piece.range.end = cut;
}

void Remapper::GiveBack(std::span<const Piece> pieces) {
  for (size_t i = pieces.size(); i-- > 0;) todo_.push_back(pieces[i]);
}

void Remapper::CountSwapped(std::span<const Piece> pieces) {
  for (const Piece& piece : pieces) {
    counts_.done += areas_[piece.area].image_data.SizeWithin(piece.range);
  }
}

}  // namespace unmoor
