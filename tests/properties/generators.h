// What the properties are about, generated: page ranges, sets of them, text. Small address spaces,
// so that ranges meet, touch and overlap often; each page of a set can be checked one by one.
#pragma once

#include <rapidcheck.h>

#include <set>
#include <string>
#include <vector>

#include "base/units.h"
#include "remap/range_set.h"

namespace unmoor::properties {

inline VaddrRange PagesAt(uint64_t begin, uint64_t end) {
  return {Vaddr(begin * kPageSize), Vaddr(end * kPageSize)};
}

// [begin, end) with begin <= end < limit, pages; short ones more often than long ones.
inline rc::Gen<VaddrRange> PageRanges(uint64_t limit) {
  const auto begin = rc::gen::inRange<uint64_t>(0, limit);
  const auto length = rc::gen::weightedOneOf<uint64_t>(
      {{3, rc::gen::inRange<uint64_t>(0, 5)}, {1, rc::gen::inRange<uint64_t>(0, limit + 1)}});
  return rc::gen::map(rc::gen::pair(begin, length), [limit](const auto& pair) {
    return PagesAt(pair.first, std::min(limit, pair.first + pair.second));
  });
}

// A set of pages, both ways: as the code under test keeps it and one by one.
struct PageSet {
  RangeSet ranges;
  std::set<uint64_t> pages;

  void Insert(VaddrRange range) {
    ranges.Insert(range);
    for (Vaddr at = range.begin; at < range.end; at = at + Bytes(kPageSize)) {
      pages.insert(at.value / kPageSize);
    }
  }
};

inline rc::Gen<PageSet> PageSets(uint64_t limit) {
  return rc::gen::map(rc::gen::container<std::vector<VaddrRange>>(PageRanges(limit)),
                      [](const std::vector<VaddrRange>& ranges) {
                        PageSet set;
                        for (const VaddrRange range : ranges) set.Insert(range);
                        return set;
                      });
}

inline std::set<uint64_t> PagesOf(const std::vector<VaddrRange>& ranges) {
  PageSet set;
  for (const VaddrRange range : ranges) set.Insert(range);
  return set.pages;
}

// Ascending, none empty, none overlapping the next.
inline bool InOrder(const std::vector<VaddrRange>& ranges) {
  for (size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].empty()) return false;
    if (i > 0 && ranges[i].begin < ranges[i - 1].end) return false;
  }
  return true;
}

// 32 lower-case hexadecimal digits.
inline rc::Gen<std::string> Ids() {
  return rc::gen::container<std::string>(32, rc::gen::elementOf(std::string("0123456789abcdef")));
}

// Valid UTF-8 with everything JSON has to escape.
inline rc::Gen<std::string> Texts() {
  const auto piece = rc::gen::elementOf(
      std::vector<std::string>{"a", "Z", "7", " ", "/", "\"", "\\", "\n", "\t", "\x01", "\x7f",
                               "[heap]", "\u00e4", "\u20ac", "\U0001f600", "{}", ":"});
  return rc::gen::map(rc::gen::container<std::vector<std::string>>(piece),
                      [](const std::vector<std::string>& pieces) {
                        std::string text;
                        for (const std::string& p : pieces) text += p;
                        return text;
                      });
}

}  // namespace unmoor::properties

namespace rc {
template <class P>
void showValue(const unmoor::Range<P>& range, std::ostream& out) {
  out << "pages " << range.begin.value / unmoor::kPageSize << ".."
      << range.end.value / unmoor::kPageSize;
}
inline void showValue(const unmoor::properties::PageSet& set, std::ostream& out) {
  out << "{";
  for (const uint64_t page : set.pages) out << " " << page;
  out << " }";
}
}  // namespace rc
