// See range_set.h.
#include "remap/range_set.h"

#include <algorithm>

namespace unmoor {

void RangeSet::Insert(VaddrRange range) {
  if (range.empty()) return;
  auto it = ranges_.upper_bound(range.begin);
  if (it != ranges_.begin() && std::prev(it)->second >= range.begin) {
    --it;
    range.begin = it->first;
  }
  while (it != ranges_.end() && it->first <= range.end) {
    range.end = std::max(range.end, it->second);
    it = ranges_.erase(it);
  }
  ranges_.emplace(range.begin, range.end);
}

void RangeSet::Erase(VaddrRange range) {
  for (const VaddrRange part : Inside(range)) {
    const auto it = std::prev(ranges_.upper_bound(part.begin));
    const VaddrRange whole{it->first, it->second};
    ranges_.erase(it);
    if (whole.begin < part.begin) ranges_.emplace(whole.begin, part.begin);
    if (part.end < whole.end) ranges_.emplace(part.end, whole.end);
  }
}

std::vector<VaddrRange> RangeSet::Inside(VaddrRange range) const {
  std::vector<VaddrRange> parts;
  auto it = ranges_.upper_bound(range.begin);
  if (it != ranges_.begin()) --it;
  for (; it != ranges_.end() && it->first < range.end; ++it) {
    const VaddrRange part = VaddrRange{it->first, it->second}.Intersect(range);
    if (!part.empty()) parts.push_back(part);
  }
  return parts;
}

std::vector<VaddrRange> RangeSet::Outside(VaddrRange range) const {
  std::vector<VaddrRange> parts;
  Vaddr at = range.begin;
  for (const VaddrRange inside : Inside(range)) {
    if (at < inside.begin) parts.push_back({at, inside.begin});
    at = inside.end;
  }
  if (at < range.end) parts.push_back({at, range.end});
  return parts;
}

Bytes RangeSet::SizeWithin(VaddrRange range) const {
  Bytes total;
  for (const VaddrRange part : Inside(range)) total += part.size();
  return total;
}

}  // namespace unmoor
