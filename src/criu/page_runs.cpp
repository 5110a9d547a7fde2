// See page_runs.h.
#include "criu/page_runs.h"

#include <algorithm>

namespace unmoor::criu {

std::vector<PageRun> MergeRuns(std::span<const PageRun> below, std::span<const PageRun> above) {
  std::vector<PageRun> result(above.begin(), above.end());
  auto top = above.begin();
  for (const PageRun& run : below) {
    const VaddrRange range = run.entry.range;
    while (top != above.end() && top->entry.range.end <= range.begin) ++top;
    Vaddr at = range.begin;
    for (auto cover = top; at < range.end; ++cover) {
      const bool covered = cover != above.end() && cover->entry.range.begin < range.end;
      const Vaddr end = covered ? cover->entry.range.begin : range.end;
      if (at < end) {
        PageRun part = run;
        part.entry.range = {at, end};
        part.entry.pages = run.entry.pages + (at - range.begin);
        result.push_back(part);
      }
      if (!covered) break;
      at = std::max(at, cover->entry.range.end);
    }
  }
  std::ranges::sort(result, {}, [](const PageRun& run) { return run.entry.range.begin; });
  return result;
}

std::vector<PageRun> RunsOf(const Pagemap& pagemap, int pages_fd, const std::string& pages_path) {
  std::vector<PageRun> runs;
  for (const PagemapEntry& entry : pagemap.entries) {
    const bool present = (entry.flags & kPagePresent) != 0;
    runs.push_back({entry, present ? pages_fd : -1, &pages_path});
  }
  return runs;
}

}  // namespace unmoor::criu
