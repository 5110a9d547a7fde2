// See address_space.h.
#include "lazy/address_space.h"

#include <algorithm>

#include "image/layout.h"
#include "os/userfaultfd.h"

namespace unmoor {
namespace {

constexpr Bytes kPage(kPageSize);

// The addresses of the piece of the layer that the first page of `run` is in.
VaddrRange PieceOf(const OverlayRun& run, uint64_t size) {
  const Bytes into(run.offset.value % size);
  const Vaddr begin(run.range.begin.value - std::min(run.range.begin.value, into.value));
  return {begin, run.range.begin + (Bytes(size) - into)};
}
VaddrRange BlockOf(const OverlayRun& run) {
  return PieceOf(run, kBlockSize);
}

// Whether both come from one place, were they one run.
bool Continue(const OverlayRun& a, const OverlayRun& b) {
  return a.layer == b.layer &&
         a.offset.value - a.range.begin.value == b.offset.value - b.range.begin.value;
}

}  // namespace

AddressSpace AddressSpace::Forked(int uffd) const {
  AddressSpace child(uffd, pages_);
  child.damaged_ = damaged_;
  return child;
}

std::string AddressSpace::problem() const {
  return out_of_memory_ ? "there is no memory for its pages; who needs one waits" : damage_;
}

Bytes AddressSpace::Take(VaddrRange range) {
  const Bytes before = pages_.left() + damaged_.left();
  pages_.Take(range);
  damaged_.Take(range);
  return before - pages_.left() - damaged_.left();
}

void AddressSpace::GivenBack(VaddrRange range) {
  given_back_ += Take(range);
  UffdWake(uffd_, range);
}

void AddressSpace::Moved(VaddrRange from, Vaddr to) {
  pages_.Move(from, to);
  damaged_.Move(from, to);
  UffdWake(uffd_, from);
}

Result<AddressSpace::Step> AddressSpace::ServeWaiting(VerifiedBlocks& source) {
  while (!waiting_.empty()) {
    UNMOOR_ASSIGN(const Step step, Serve(waiting_.back(), source));
    if (step != Step::kDone) return step;
    waiting_.pop_back();
  }
  return Step::kDone;
}

Result<AddressSpace::Step> AddressSpace::Serve(VaddrRange page, VerifiedBlocks& source) {
  auto run = pages_.Find(page.begin);
  if (!run) run = damaged_.Find(page.begin);
  if (!run) return Place(page, {});
  UNMOOR_ASSIGN(const std::span<const std::byte> block, source.Block(run->layer, run->offset));
  // First the page that is waited for: its thread goes on while the others come.
  UNMOOR_ASSIGN(const Step step,
                Place(page, block.subspan(run->offset.value % kBlockSize, kPageSize)));
  if (step != Step::kDone) return step;
  UNMOOR_ASSIGN(Step around, PlaceBlock(*run, block));
  if (around == Step::kDone && source.PieceSize(run->layer) > kBlockSize) {
    UNMOOR_ASSIGN(around, PlacePiece(*run, source));
  }
  return around == Step::kGone ? around : Step::kDone;
}

Result<AddressSpace::Step> AddressSpace::BringNext(VerifiedBlocks& source) {
  Cursor cursor = cursor_;
  const auto run = Next(cursor);
  if (!run) return Step::kDone;
  if (source.IsComing(BlockAt(run->layer, run->offset))) return Step::kWait;
  const auto block = source.Block(run->layer, run->offset);
  if (!block) {
    damage_ = block.error().message();
    SetAside(*run);
    return Step::kDone;
  }
  UNMOOR_ASSIGN(const Step step, PlaceBlock(*run, *block));
  if (step == Step::kDone) cursor_ = cursor;
  return step;
}

std::optional<OverlayRun> AddressSpace::Next(Cursor& cursor) const {
  for (; cursor.first < first_.size(); ++cursor.first, cursor.in_first = Vaddr()) {
    const VaddrRange wanted = first_[cursor.first];
    const auto run = pages_.Next(std::max(wanted.begin, cursor.in_first));
    if (!run || run->range.begin >= wanted.end) continue;
    cursor.in_first = BlockOf(*run).end;
    return run;
  }
  auto run = pages_.Next(cursor.next);
  if (!run) run = pages_.Next(Vaddr());
  if (run) cursor.next = BlockOf(*run).end;
  return run;
}

std::vector<BlockName> AddressSpace::Upcoming(size_t count) const {
  std::vector<BlockName> blocks;
  Cursor cursor = cursor_;
  while (blocks.size() < count) {
    const auto run = Next(cursor);
    if (!run) break;
    blocks.push_back(BlockAt(run->layer, run->offset));
  }
  return blocks;
}

Result<AddressSpace::Step> AddressSpace::PlacePiece(const OverlayRun& run, VerifiedBlocks& source) {
  const VaddrRange piece = PieceOf(run, source.PieceSize(run.layer));
  Vaddr at = piece.begin;
  for (auto part = pages_.Next(at); part && part->range.begin < piece.end; part = pages_.Next(at)) {
    at = part->range.end;
    if (!Continue(*part, run)) continue;
    at = BlockOf(*part).end;
    UNMOOR_ASSIGN(const auto block, source.Block(part->layer, part->offset));
    UNMOOR_ASSIGN(const Step step, PlaceBlock(*part, block));
    if (step != Step::kDone) return step;
  }
  return Step::kDone;
}

// What is to come from the block that `run` begins in, wherever of it.
Result<AddressSpace::Step> AddressSpace::PlaceBlock(const OverlayRun& run,
                                                    std::span<const std::byte> block) {
  const VaddrRange window = BlockOf(run);
  for (auto part = pages_.Next(window.begin); part && part->range.begin < window.end;) {
    const VaddrRange range = part->range.Intersect(window);
    if (Continue(*part, run)) {
      const auto pages = block.subspan(part->offset.value % kBlockSize, range.size().value);
      UNMOOR_ASSIGN(const Step step, Place(range, pages));
      if (step != Step::kDone) return step;
    }
    part = pages_.Next(range.end);
  }
  return Step::kDone;
}

void AddressSpace::SetAside(const OverlayRun& run) {
  const VaddrRange part = run.range.Intersect(BlockOf(run));
  pages_.Take(part);
  damaged_.Add({part, run.layer, run.offset});
}

// Zeros where there are no `pages`.
Result<AddressSpace::Step> AddressSpace::Place(VaddrRange range, std::span<const std::byte> pages) {
  using Stop = UffdPlaced::Stop;
  Bytes most = range.size();  // at once; a single page once that went beyond a VMA
  for (Vaddr at = range.begin; at < range.end;) {
    const VaddrRange part{at, std::min(range.end, at + most)};
    UNMOOR_ASSIGN(
        const UffdPlaced placed,
        pages.empty()
            ? UffdZero(uffd_, part)
            : UffdCopy(uffd_, at, pages.subspan((at - range.begin).value, part.size().value)));
    come_ += Take({at, at + placed.bytes});
    at = at + placed.bytes;
    out_of_memory_ = placed.stop == Stop::kOutOfMemory;
    const VaddrRange page{at, at + kPage};
    switch (placed.stop) {
      case Stop::kNone:
        break;
      case Stop::kNotThere:
        if (most > kPage) {
          most = kPage;
          break;
        }
        if (UffdIsChanging(uffd_)) return Step::kWait;
        GivenBack(page);
        at = page.end;
        break;
      case Stop::kPresent:
        come_ += Take(page);
        UffdWake(uffd_, page);
        at = page.end;
        break;
      case Stop::kChanging:
      case Stop::kOutOfMemory:
        return Step::kWait;
      case Stop::kGone:
        return Step::kGone;
    }
  }
  return Step::kDone;
}

}  // namespace unmoor
