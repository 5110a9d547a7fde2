// See simulated_carrier.h. The counterpart of each function is in src/agent/worker.cpp.
#include "simulated_carrier.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

namespace unmoor::simulation {
namespace {

PageRange ToPageRange(VaddrRange r) {
  return {r.begin.value / kPageSize, r.end.value / kPageSize};
}
VaddrRange ToAddresses(PageRange r) {
  return {Vaddr(r.begin * kPageSize), Vaddr(r.end * kPageSize)};
}

}  // namespace

Result<std::vector<Carrier::PlannedArea>> SimulatedCarrier::Plan() {
  yield_();
  const auto vmas = program_.Vmas();
  yield_();
  areas_.clear();
  for (Area& area : FindAreas(vmas, [](const VmaInfo& vma) { return vma.inode != 0; }, dropped_)) {
    (void)MirrorFor(area);
    PlannedArea planned{area, {}};
    const PageRange pages = ToPageRange(area.range);
    for (uint64_t page = pages.begin; page < pages.end; ++page) {
      const VaddrRange at = ToAddresses({page, page + 1});
      if (program_.ImagePage(area.OffsetOf(at.begin).value / kPageSize) != 0) {
        planned.image_data.Insert(at);
      }
    }
    areas_.push_back(std::move(planned));
  }
  if (plans_with_areas_twice > 0 && !areas_.empty()) {
    --plans_with_areas_twice;
    areas_.push_back(areas_.front());
  }
  stale_ = false;
  return areas_;
}

SimulatedCarrier::Mirror& SimulatedCarrier::MirrorFor(const Area& area) {
  for (Mirror& mirror : mirrors_) {
    if (mirror.area.range.Contains(area.range) && mirror.area.prot == area.prot &&
        mirror.area.OffsetOf(area.range.begin).value == area.offset) {
      return mirror;
    }
  }
  return mirrors_.emplace_back(Mirror{area, {}});
}

Result<bool> SimulatedCarrier::HandleEvents() {
  yield_();
  bool changed = std::exchange(stale_, false);
  while (!program_.events().empty()) {
    if (GivesBackAgain() && !faults_.never_stopped) {
      HandleEventsStopped(changed);
      yield_();
      continue;
    }
    if (!faults_.drop_late) {
      for (const Event& event : program_.events()) {
        if (event.kind == Action::Kind::kGiveBack) Drop(event.pages);
      }
    }
    yield_();
    const Event event = program_.ReadEvent();
    if (event.kind != Action::Kind::kGiveBack) {
      dropped_.Erase(ToAddresses(event.pages));
      changed = true;
    } else if (faults_.drop_late) {
      yield_();
      Drop(event.pages);
    }
    yield_();
  }
  return changed;
}

bool SimulatedCarrier::GivesBackAgain() const {
  return std::ranges::any_of(program_.events(), [&](const Event& event) {
    return event.kind == Action::Kind::kGiveBack &&
           !dropped_.Inside(ToAddresses(event.pages)).empty();
  });
}

void SimulatedCarrier::HandleEventsStopped(bool& changed) {
  std::vector<PageRange> given_back;
  while (!program_.events().empty()) {
    const Event event = program_.ReadEvent();
    if (event.kind == Action::Kind::kGiveBack) {
      given_back.push_back(event.pages);
    } else {
      dropped_.Erase(ToAddresses(event.pages));
      changed = true;
    }
  }
  program_.StopThreads();
  for (const PageRange range : given_back) Drop(range);
}

void SimulatedCarrier::Drop(PageRange range) {
  for (uint64_t number = range.begin; number < range.end; ++number) {
    const auto it = program_.pages().find(number);
    if (it == program_.pages().end()) continue;
    Page& page = it->second;
    const VaddrRange at = ToAddresses({number, number + 1});
    if (page.image) {
      page = {.image = false, .own = {}, .watched = true, .read_only = page.read_only};
      dropped_.Insert(at);
    }
  }
  if (faults_.keep_copies) return;
  for (Mirror& mirror : mirrors_) {
    mirror.pages.erase(mirror.pages.lower_bound(range.begin), mirror.pages.lower_bound(range.end));
  }
}

Result<std::vector<VaddrRange>> SimulatedCarrier::OwnPages(VaddrRange range, bool written_only) {
  yield_();
  std::vector<VaddrRange> found;
  const PageRange pages = ToPageRange(range);
  auto& all = program_.pages();
  const auto begin = all.lower_bound(pages.begin);
  const auto end = all.lower_bound(pages.end);
  if (std::any_of(begin, end, [](const auto& entry) { return !entry.second.watched; })) {
    stale_ = true;
    return found;
  }
  for (auto it = begin; it != end; ++it) {
    Page& page = it->second;
    if (!page.own || (written_only && !page.written)) continue;
    page.written = false;
    found.push_back(ToAddresses({it->first, it->first + 1}));
  }
  return found;
}

Result<> SimulatedCarrier::Copy(size_t index, std::span<const CopyStep> steps) {
  Mirror& mirror = MirrorFor(areas_[index].area);
  for (const CopyStep& step : steps) {
    for (const VaddrRange range : step.content.image) {
      const PageRange pages = ToPageRange(range);
      for (uint64_t page = pages.begin; page < pages.end; ++page) {
        const FileOffset offset = mirror.area.OffsetOf(Vaddr(page * kPageSize));
        mirror.pages[page] = program_.ImagePage(offset.value / kPageSize);
      }
    }
    for (const VaddrRange range : step.content.own) {
      if (!CopyOwn(mirror, range)) return {};
    }
  }
  return {};
}

Result<> SimulatedCarrier::CopyAgain(size_t index, std::span<const VaddrRange> ranges) {
  Mirror& mirror = MirrorFor(areas_[index].area);
  for (const VaddrRange range : ranges) {
    if (!CopyOwn(mirror, range)) return {};
  }
  return {};
}

// False, and the plan is stale, where nothing is mapped any more.
bool SimulatedCarrier::CopyOwn(Mirror& mirror, VaddrRange range) {
  const PageRange pages = ToPageRange(range);
  for (uint64_t number = pages.begin; number < pages.end; ++number) {
    yield_();
    const auto it = program_.pages().find(number);
    if (it == program_.pages().end()) {
      stale_ = true;
      return false;
    }
    mirror.pages[number] = program_.View(it->second);
  }
  return true;
}

bool SimulatedCarrier::IsAsPlanned(const Area& area, VaddrRange range) {
  const PageRange pages = ToPageRange(range);
  for (uint64_t number = pages.begin; number < pages.end; ++number) {
    const auto it = program_.pages().find(number);
    if (it == program_.pages().end()) return false;
    const Page& page = it->second;
    const Vaddr at(number * kPageSize);
    if (page.read_only != ((area.prot & PROT_WRITE) == 0)) return false;
    if (!page.image && dropped_.Inside({at, at + Bytes(kPageSize)}).empty()) return false;
    if (page.image && page.file_page * kPageSize != area.OffsetOf(at).value) return false;
  }
  return true;
}

Result<SwapOutcome> SimulatedCarrier::Swap(std::span<const Piece> pieces, PageCount dirty_limit) {
  yield_();
  SwapOutcome outcome;
  outcome.pause = Nanos(1000);
  const bool as_planned = faults_.no_checks || std::ranges::all_of(pieces, [&](const Piece& piece) {
                            return IsAsPlanned(areas_[piece.area].area, piece.range);
                          });
  if (!as_planned) {
    outcome.result = SwapResult::kStale;
    return outcome;
  }
  yield_();
  program_.StopThreads();
  if (!program_.events().empty() || (refuses_to_stop && refuses_to_stop())) return outcome;
  uint64_t limit = dirty_limit.value;
  const bool dirty = too_dirty && too_dirty();
  if (dirty) limit = 0;
  for (const Piece& piece : pieces) {
    if (!faults_.no_checks && !IsAsPlanned(areas_[piece.area].area, piece.range)) {
      outcome.result = SwapResult::kStale;
      return outcome;
    }
  }
  for (const Piece& piece : pieces) {
    if (!faults_.no_recheck && !Recheck(piece, limit)) {
      outcome.result = SwapResult::kTooDirty;
      return outcome;
    }
  }
  if (faults_.no_guard) yield_();
  uint64_t own = 0;
  for (const Piece& piece : pieces) own += CountOwn(piece.range);
  for (const Piece& piece : pieces) SwapPiece(piece);
  if (swapped) swapped(own);
  outcome.result = SwapResult::kSwapped;
  return outcome;
}

uint64_t SimulatedCarrier::CountOwn(VaddrRange range) const {
  const PageRange pages = ToPageRange(range);
  auto& all = program_.pages();
  return static_cast<uint64_t>(
      std::count_if(all.lower_bound(pages.begin), all.lower_bound(pages.end),
                    [](const auto& entry) { return entry.second.own.has_value(); }));
}

// False when more was written than `limit`; what was copied until then stays copied.
bool SimulatedCarrier::Recheck(const Piece& piece, uint64_t& limit) {
  Mirror& mirror = MirrorFor(areas_[piece.area].area);
  const PageRange pages = ToPageRange(piece.range);
  auto& all = program_.pages();
  for (auto it = all.lower_bound(pages.begin); it != all.lower_bound(pages.end); ++it) {
    if (!it->second.written) continue;
    if (limit-- == 0) return false;
    mirror.pages[it->first] = program_.View(it->second);
  }
  return true;
}

void SimulatedCarrier::SwapPiece(const Piece& piece) {
  Mirror& mirror = MirrorFor(areas_[piece.area].area);
  const PageRange pages = ToPageRange(piece.range);
  for (uint64_t number = pages.begin; number < pages.end; ++number) {
    Page page;
    page.read_only = (areas_[piece.area].area.prot & PROT_WRITE) == 0;
    if (const auto it = mirror.pages.find(number); it != mirror.pages.end()) page.own = it->second;
    program_.pages()[number] = page;
    mirror.pages.erase(number);
  }
  dropped_.Erase(piece.range);
}

void SimulatedCarrier::Pause(Nanos /*time*/) {
  yield_();
}

}  // namespace unmoor::simulation
