// Runs of a task's pages from several files, put together into one pagemap.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "criu/page_images.h"

namespace unmoor::criu {

// Where a run of pages comes from: `entry.pages` is the offset in the file of `fd`. No file (fd
// negative): the entry has no pages. The descriptor and the path are the caller's.
struct PageRun {
  PagemapEntry entry;
  int fd = -1;
  const std::string* path = nullptr;
};

// `above`, and `below` where `above` has nothing. Both are ascending and disjoint, and so is the
// result.
[[nodiscard]] std::vector<PageRun> MergeRuns(std::span<const PageRun> below,
                                             std::span<const PageRun> above);

// The entries of a pagemap as runs of its pages file.
[[nodiscard]] std::vector<PageRun> RunsOf(const Pagemap& pagemap, int pages_fd,
                                          const std::string& pages_path);

}  // namespace unmoor::criu
