// PageImage and PageImageWriter: memory ranges in a directory, laid out to be mapped.
//
//   auto writer = unmoor::PageImageWriter::Create("/var/lib/heap/1");
//   writer->Add({heap, heap_size});
//   writer->SetUserData(roots);
//   auto report = writer->Publish();
//
//   auto image = unmoor::PageImage::Open("/var/lib/heap/1");
//   auto map = unmoor::DirectMap::Map(*image);      // direct_map.h
//
// An image is never changed once it is published and needs no other directory: moving it, or
// deleting an earlier or later one, is safe. Its format is that of `unmoor dump` (docs/format.md).
// To write memory again as a delta against an earlier image: Checkpoint (checkpoint.h).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "unmoor/memory_range.h"
#include "unmoor/status.h"

namespace unmoor {
inline namespace v1 {

// What was written.
struct ImageReport {
  std::string id;              // of the image: 32 hexadecimal digits
  bool delta = false;          // some pages are shared with the base image
  uint64_t address_bytes = 0;  // of the ranges
  uint64_t written_bytes = 0;  // pages of data written by this image
  uint64_t shared_bytes = 0;   // pages of data in layers it shares with the base image
};

struct WriterOptions {
  // On disk when Publish returns. Without it a crash of the machine (not of the program) can leave
  // an image that Open or Verify then calls damaged.
  bool sync = true;
  // A directory that already holds an image is replaced at the moment the new one is complete.
  bool replace = false;
};

// Fills `pages` (size bytes, whole pages) with what the image shall hold at `address`. Pages of
// zeros take no room. An error ends Publish with that error.
using PageSource = std::function<Status(uint64_t address, void* pages, size_t size)>;

// One thread at a time. Destroying an unpublished writer leaves nothing behind.
class PageImageWriter {
 public:
  // kInvalidArgument when `dir` exists and is not empty (see WriterOptions::replace), or its parent
  // is missing.
  static StatusOr<PageImageWriter> Create(const std::string& dir,
                                          const WriterOptions& options = {});
  PageImageWriter(PageImageWriter&&) noexcept;
  PageImageWriter& operator=(PageImageWriter&&) noexcept;
  ~PageImageWriter();

  // Memory of this process with the protections it has: private mappings, all of it mapped, page
  // aligned, no two ranges overlapping. It is read by Publish, not here; nothing may write to it
  // meanwhile (a page being written is saved as it is at some moment during Publish). Memory
  // without PROT_READ is recorded as an empty range, or refused when it holds data.
  Status Add(MemoryRange memory);
  // Pages that come from `source`, to be mapped at `address` with `protection` (PROT_…). Called
  // during Publish, ascending by address, a chunk at a time.
  Status Add(uint64_t address, uint64_t size, int protection, PageSource source);
  // Bytes kept beside the pages, at most 256 MiB: roots, a version, whatever finds things again.
  Status SetUserData(std::string_view bytes);

  // Writes everything; the directory appears complete or not at all. Once.
  StatusOr<ImageReport> Publish();

 private:
  class Impl;
  explicit PageImageWriter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

struct ImageRange {
  uint64_t address = 0;  // where it was, and where Placement::kRecorded puts it
  uint64_t size = 0;
  int protection = 0;       // PROT_READ | PROT_WRITE | PROT_EXEC
  uint64_t data_bytes = 0;  // pages that hold data; the rest reads zero
};

struct OpenOptions {
  // Refuse an image made on a CPU with features this one lacks: its memory may hold code, or data
  // of code, that chose by them.
  bool check_cpu = true;
};

// An opened image. A value: copies share what is open, and keep it open. Safe from any thread.
class PageImage {
 public:
  // Checks the manifest, every index and the size of every file; the pages themselves are checked
  // by Verify, or batch by batch as they are remapped (RemapOptions::verify). kNotFound, kDamaged,
  // or kUnsupported (another format version, page size, CPU; a checkpoint of a whole process).
  static StatusOr<PageImage> Open(const std::string& dir, const OpenOptions& options = {});

  [[nodiscard]] const std::string& directory() const;  // absolute, where it was when opened
  [[nodiscard]] const std::string& id() const;
  [[nodiscard]] const std::string& parent_id() const;           // empty: none
  [[nodiscard]] const std::vector<ImageRange>& ranges() const;  // ascending, apart
  [[nodiscard]] const std::string& user_data() const;

  // Reads all pages and compares them with their hashes.
  Status Verify() const;

  class Impl;
  [[nodiscard]] const std::shared_ptr<const Impl>& impl() const { return impl_; }

 private:
  explicit PageImage(std::shared_ptr<const Impl> impl);
  std::shared_ptr<const Impl> impl_;
};

}  // namespace v1
}  // namespace unmoor
