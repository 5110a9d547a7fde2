// LayerWriter: receives the pages of frozen tasks and makes a layer (.pages and .index) of them.
//
//   auto writer = LayerWriter::Create(LayersDirectory(dir), id);
//   writer->AddTask(vpid, vmas);                    // when that task's pages begin
//   auto room = writer->Reserve(vpid, at, size);    // or Write(), which copies
//   ReadStream(socket, *room, "page server");
//   writer->Commit(Bytes(room->size()));
//   LayerInfo info = *writer->Finish(true);
//
// One thread receives (calls the functions below), a second one, owned by the writer, looks for
// zero pages and writes; between them a bounded ring of 2 MiB buffers. All-zero pages
// become holes. The first failure (a full disk, say) is kept and returned by every later call.
// Destroying an unfinished writer joins its thread and leaves the incomplete files to whoever owns
// the directory (Publisher). Document: docs/format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/result.h"
#include "base/units.h"
#include "image/layer.h"

namespace unmoor {

// When pages start on their way to the disk. Starting early shortens a durable Finish, but a busy
// disk can then stall the receiving: not for dumps whose frozen time counts.
enum class WriteBack { kLater, kAsItGoes };

// What pages of zeros become: holes that belong to no segment, or, in a layer that lies over
// others, pages like any other (then holes inside a segment), so that they hide what is below.
enum class ZeroPages { kHole, kKeep };

class LayerWriter {
 public:
  // Creates <directory>/<id>.pages and .index, which must not exist; makes `directory` if needed.
  [[nodiscard]] static Result<LayerWriter> Create(const std::string& directory,
                                                  const std::string& id,
                                                  WriteBack write_back = WriteBack::kLater,
                                                  ZeroPages zero_pages = ZeroPages::kHole);
  LayerWriter(LayerWriter&&) noexcept;
  LayerWriter& operator=(LayerWriter&&) noexcept;
  ~LayerWriter();

  // Registers a task and allocates one extent for each of its VMAs (page-aligned, ascending,
  // apart). Once for each task; tasks in any order, several at a time.
  [[nodiscard]] Result<> AddTask(uint32_t task_vpid, std::span<const VaddrRange> vmas);

  // Whether `at` lies in a registered VMA of that task; the end of that VMA, or nothing.
  [[nodiscard]] Result<VaddrRange> VmaOf(uint32_t task_vpid, Vaddr at) const;

  // Whole pages inside one registered VMA, ascending within the task, split as the caller likes.
  [[nodiscard]] Result<> Write(uint32_t task_vpid, Vaddr at, std::span<const std::byte> pages);

  // The same without a copy: room for up to `want` bytes at `at` (at least one page, whole pages),
  // to be filled and handed over by Commit(n), n <= its size, before any other call.
  [[nodiscard]] Result<std::span<std::byte>> Reserve(uint32_t task_vpid, Vaddr at, Bytes want);
  [[nodiscard]] Result<> Commit(Bytes n);

  // What has been written so far, as Finish will tell it, but for checksums; waits for the writing.
  // From then on pages_fd() can be read.
  [[nodiscard]] Result<LayerInfo> Snapshot();
  [[nodiscard]] int pages_fd() const;

  // Waits for the writing, hashes, writes the index. With `sync` both files are durable on return
  // (fsync); without, Publisher::Publish makes them so: for dumps that leave the program running,
  // whose frozen time must not hold a disk flush. Called once, nothing else after it.
  [[nodiscard]] Result<LayerInfo> Finish(bool sync);

 private:
  class Impl;
  explicit LayerWriter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace unmoor
