// PagesToCome against a table of single pages.
#include "lazy/pages_to_come.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

namespace unmoor {
namespace {

constexpr uint64_t kPages = 64;

VaddrRange Pages(uint64_t begin, uint64_t count) {
  return {Vaddr(begin * kPageSize), Vaddr((begin + count) * kPageSize)};
}

// Page number to (layer, file offset).
using Table = std::map<uint64_t, std::pair<uint32_t, uint64_t>>;

void Erase(Table& table, uint64_t begin, uint64_t count) {
  table.erase(table.lower_bound(begin), table.lower_bound(begin + count));
}

void ExpectSame(const Table& table, const PagesToCome& pages) {
  for (uint64_t page = 0; page < 2 * kPages; ++page) {
    const auto run = pages.Find(Vaddr(page * kPageSize));
    const auto expected = table.find(page);
    ASSERT_EQ(run.has_value(), expected != table.end()) << page;
    if (!run) continue;
    EXPECT_EQ(run->layer, expected->second.first);
    EXPECT_EQ(run->offset.value, expected->second.second);
  }
  EXPECT_EQ(pages.left().value, table.size() * kPageSize);
  EXPECT_EQ(pages.empty(), table.empty());
}

TEST(PagesToCome, FollowsAnyHistoryPageByPage) {
  std::mt19937 random(11);
  const auto below = [&](uint64_t n) { return random() % n; };
  for (int round = 0; round < 300; ++round) {
    std::vector<OverlayRun> runs;
    Table table;
    for (uint64_t page = below(4); page < kPages;) {
      const uint64_t count = 1 + below(8);
      const uint32_t layer = static_cast<uint32_t>(below(3));
      const uint64_t offset = below(1000) * kPageSize;
      runs.push_back({Pages(page, count), layer, FileOffset(offset)});
      for (uint64_t i = 0; i < count; ++i) table[page + i] = {layer, offset + i * kPageSize};
      page += count + below(6);
    }
    PagesToCome pages(runs);
    for (int step = 0; step < 20; ++step) {
      const uint64_t begin = below(kPages), count = 1 + below(12);
      if (below(2) == 0) {
        pages.Take(Pages(begin, count));
        Erase(table, begin, count);
      } else {
        const uint64_t to = below(2) == 0 ? begin + count + below(kPages - count) : below(kPages);
        Table moved;
        for (uint64_t i = 0; i < count; ++i) {
          if (const auto page = table.find(begin + i); page != table.end()) {
            moved[to + i] = page->second;
          }
        }
        pages.Move(Pages(begin, count), Vaddr(to * kPageSize));
        Erase(table, begin, count);
        Erase(table, to, count);
        table.merge(moved);
      }
      ExpectSame(table, pages);
    }
  }
}

TEST(PagesToCome, NextGivesWhatIsLeftOfARunAndThenTheNext) {
  const PagesToCome pages(std::vector<OverlayRun>{{Pages(4, 4), 0, FileOffset(0)},
                                                  {Pages(10, 1), 1, FileOffset(8 * kPageSize)}});
  EXPECT_EQ(pages.Next(Vaddr())->range, Pages(4, 4));
  EXPECT_EQ(pages.Next(Vaddr(6 * kPageSize))->range, Pages(6, 2));
  EXPECT_EQ(pages.Next(Vaddr(6 * kPageSize))->offset, FileOffset(2 * kPageSize));
  EXPECT_EQ(pages.Next(Vaddr(8 * kPageSize))->range, Pages(10, 1));
  EXPECT_FALSE(pages.Next(Vaddr(11 * kPageSize)));
}

}  // namespace
}  // namespace unmoor
