// See pages_to_come.h.
#include "lazy/pages_to_come.h"

#include <algorithm>
#include <iterator>
#include <vector>

namespace unmoor {
namespace {

OverlayRun Part(const OverlayRun& run, VaddrRange range) {
  return {range, run.layer, run.offset + (range.begin - run.range.begin)};
}

}  // namespace

PagesToCome::PagesToCome(std::span<const OverlayRun> runs) {
  for (const OverlayRun& run : runs) Add(run);
}

std::optional<OverlayRun> PagesToCome::Find(Vaddr at) const {
  const auto next = Next(at);
  return next && next->range.begin == at ? next : std::nullopt;
}

std::optional<OverlayRun> PagesToCome::Next(Vaddr at) const {
  auto run = runs_.upper_bound(at);
  if (run != runs_.begin() && std::prev(run)->second.range.Contains(at)) {
    return Part(std::prev(run)->second, {at, std::prev(run)->second.range.end});
  }
  if (run == runs_.end()) return std::nullopt;
  return run->second;
}

void PagesToCome::Add(const OverlayRun& run) {
  if (run.range.empty()) return;
  runs_.emplace(run.range.begin, run);
  left_ += run.range.size();
}

void PagesToCome::Take(VaddrRange range) {
  auto run = runs_.upper_bound(range.begin);
  if (run != runs_.begin()) --run;
  while (run != runs_.end() && run->second.range.begin < range.end) {
    const OverlayRun whole = run->second;
    if (!whole.range.Overlaps(range)) {
      ++run;
      continue;
    }
    run = runs_.erase(run);
    left_ -= whole.range.size();
    Add(Part(whole, {whole.range.begin, std::max(whole.range.begin, range.begin)}));
    const Vaddr rest = std::min(whole.range.end, range.end);
    Add(Part(whole, {rest, whole.range.end}));
  }
}

void PagesToCome::Move(VaddrRange from, Vaddr to) {
  std::vector<OverlayRun> moved;
  for (auto run = Next(from.begin); run && run->range.begin < from.end;
       run = Next(run->range.end)) {
    const VaddrRange part = run->range.Intersect(from);
    const Vaddr begin = to + (part.begin - from.begin);
    moved.push_back({{begin, begin + part.size()}, run->layer, run->offset});
  }
  Take(from);
  Take({to, to + from.size()});
  for (const OverlayRun& run : moved) Add(run);
}

}  // namespace unmoor
