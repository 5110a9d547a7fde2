// pagemap-<vpid>.img, pagemap-shmem-<id>.img and pages-<n>.img in CRIU's own format.
//
// The writer leaves just what CRIU's own page server would: one pages file for each stream,
// numbered from 1 in the order of opening, adjacent pages with equal flags in one entry. CRIU
// refuses a task whose pagemap has no entry, so Finish does too; ask HasEntries and route one page
// here. One thread at a time. Errors name the file; what was written stays for the caller to
// remove.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "criu/page_server.h"
#include "os/fd.h"

namespace unmoor::criu {

class PageImageWriter {
 public:
  // `directory`: CRIU's image directory, existing.
  explicit PageImageWriter(std::string directory) : directory_(std::move(directory)) {}

  [[nodiscard]] Result<> Open(PageStreamId id);
  [[nodiscard]] Result<> Pages(PageStreamId id, Vaddr at, uint32_t flags,
                               std::span<const std::byte> data);
  [[nodiscard]] Result<> Absent(PageStreamId id, VaddrRange range, uint32_t flags);
  [[nodiscard]] bool HasEntries(PageStreamId id) const;
  // Writes the pagemap files. `sync`: fsync every file (the directory is the caller's).
  [[nodiscard]] Result<> Finish(bool sync);
  // Bytes of pages written.
  [[nodiscard]] Bytes written() const { return written_; }

 private:
  struct Entry {
    uint64_t begin;
    uint64_t pages;
    uint32_t flags;
  };
  struct Stream {
    uint32_t pages_id = 0;
    std::string pages_path;
    Fd pages;
    uint64_t size = 0;
    std::vector<Entry> entries;
  };
  [[nodiscard]] Result<Stream*> Find(PageStreamId id);
  [[nodiscard]] Result<> Add(Stream& stream, PageStreamId id, uint64_t begin, uint64_t pages,
                             uint32_t flags);

  std::string directory_;
  std::map<PageStreamId, Stream> streams_;
  uint32_t next_pages_id_ = 1;
  Bytes written_;
};

struct PagemapEntry {
  VaddrRange range;
  uint32_t flags = 0;
  FileOffset pages;  // where its pages are in pages-<n>.img; meaningful with kPagePresent only
};

struct Pagemap {
  uint32_t pages_id = 0;
  std::vector<PagemapEntry> entries;  // ascending, disjoint
  [[nodiscard]] Bytes PresentBytes() const;
};

// "pagemap-123.img", "pagemap-shmem-45.img", "pages-1.img".
[[nodiscard]] std::string PagemapName(PageStreamId id);
[[nodiscard]] std::string PagesName(uint32_t pages_id);
// The stream of a file named as PagemapName does.
[[nodiscard]] std::optional<PageStreamId> ParsePagemapName(std::string_view name);

// The bytes of a pagemap image. Adjacent entries with equal flags become one.
[[nodiscard]] std::string EncodePagemap(uint32_t pages_id, std::span<const PagemapEntry> entries);
[[nodiscard]] Result<Pagemap> ReadPagemap(const std::string& directory, PageStreamId id);

}  // namespace unmoor::criu
