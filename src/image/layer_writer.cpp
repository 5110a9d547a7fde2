// See layer_writer.h.
//
// receiver thread                         writer thread
//   Reserve/Commit fill a buffer   ──►      for each piece: skip zero pages, hash, pwrite
//   (blocks when all are in flight) ◄──     give the buffer back
//
// BufferRing is the only thing both touch, but for Task::output, which belongs to the writer thread
// until it is joined and to Finish afterwards.
#include "image/layer_writer.h"

#include <fcntl.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/fault_point.h"
#include "base/zero.h"
#include "image/index_writer.h"
#include "image/layout.h"
#include "os/fd.h"
#include "os/file.h"

namespace unmoor {
namespace {

// A block that comes whole is written by one call, so that the page cache makes one huge page of
// it, which a program then maps by one entry (docs/decisions.md, 76).
constexpr size_t kBufferSize = kHugePageSize;
constexpr size_t kBufferCount = 8;
constexpr uint64_t kWritebackStep = uint64_t{16} << 20;

bool IsZeroPage(const std::byte* page) {
  return IsZero({page, kPageSize});
}

// What the writer thread has done for one task.
struct TaskOutput {
  std::vector<FileRange> runs;  // ascending, never touching

  void AddRun(FileRange run) {
    if (!runs.empty() && runs.back().end == run.begin) {
      runs.back().end = run.end;
    } else {
      runs.push_back(run);
    }
  }
};

struct Task {
  std::vector<Extent> extents;  // ascending by address
  Vaddr next;                   // pages below it have been received
  TaskOutput output;            // the writer thread's
};

// Pages of one task at consecutive file offsets, consecutive in the buffer too.
struct Piece {
  TaskOutput* output;
  FileOffset offset;
  size_t begin;
  size_t size;
};

struct Buffer {
  Mapping memory;
  size_t used = 0;
  std::vector<Piece> pieces;

  // Lengthens the last piece where the pages go on.
  void Append(TaskOutput* output, FileOffset offset, size_t size) {
    if (!pieces.empty() && pieces.back().output == output &&
        pieces.back().offset + Bytes(pieces.back().size) == offset) {
      pieces.back().size += size;
    } else {
      pieces.push_back({output, offset, used, size});
    }
    used += size;
  }
};

// The bounded exchange of buffers. Keeps the first error.
class BufferRing {
 public:
  [[nodiscard]] Result<> Allocate() {
    for (Buffer& buffer : buffers_) {
      UNMOOR_ASSIGN(buffer.memory, Mapping::Anonymous(kBufferSize));
      free_.push_back(&buffer);
    }
    return {};
  }

  // Receiver: an empty buffer, or the error of the writer thread.
  [[nodiscard]] Result<Buffer*> TakeEmpty() {
    std::unique_lock lock(mutex_);
    freed_.wait(lock, [&] { return !free_.empty() || error_; });
    if (error_) return Failure(*error_);
    Buffer* buffer = free_.front();
    free_.pop_front();
    buffer->used = 0;
    buffer->pieces.clear();
    return buffer;
  }
  void Submit(Buffer* buffer) {
    const std::lock_guard lock(mutex_);
    full_.push_back(buffer);
    filled_.notify_one();
  }
  // Nothing comes any more. With `discard` what waits is dropped.
  void CloseInput(bool discard) {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    if (discard) full_.clear();
    filled_.notify_one();
  }

  // Writer thread: null at the end.
  [[nodiscard]] Buffer* TakeFull() {
    std::unique_lock lock(mutex_);
    filled_.wait(lock, [&] { return !full_.empty() || closed_; });
    if (full_.empty()) return nullptr;
    Buffer* buffer = full_.front();
    full_.pop_front();
    return buffer;
  }
  void GiveBack(Buffer* buffer, Result<> result) {
    const std::lock_guard lock(mutex_);
    if (!result && !error_) error_ = std::move(result).error();
    free_.push_back(buffer);
    freed_.notify_one();
  }
  // Receiver: until all that was submitted is written.
  [[nodiscard]] Result<> AwaitIdle() {
    std::unique_lock lock(mutex_);
    freed_.wait(lock, [&] { return free_.size() == kBufferCount || error_; });
    if (error_) return Failure(*error_);
    return {};
  }

  [[nodiscard]] Result<> status() {
    const std::lock_guard lock(mutex_);
    if (error_) return Failure(*error_);
    return {};
  }

 private:
  std::array<Buffer, kBufferCount> buffers_;
  std::mutex mutex_;  // guards all below
  std::condition_variable freed_;
  std::condition_variable filled_;
  std::deque<Buffer*> free_;
  std::deque<Buffer*> full_;
  bool closed_ = false;
  std::optional<Error> error_;
};

// The writer thread's work on the .pages file.
class PageSink {
 public:
  PageSink(int fd, std::string path, WriteBack write_back, ZeroPages zero_pages)
      : fd_(fd), path_(std::move(path)), write_back_(write_back), zero_pages_(zero_pages) {}

  [[nodiscard]] Result<> Write(const Buffer& buffer) {
    UNMOOR_TRY(FaultPoint("layer.write"));
    const auto bytes = buffer.memory.bytes();
    for (const Piece& piece : buffer.pieces) {
      UNMOOR_TRY(WritePiece(piece, bytes.subspan(piece.begin, piece.size)));
    }
    return {};
  }

 private:
  [[nodiscard]] Result<> WritePiece(const Piece& piece, std::span<const std::byte> bytes) {
    for (size_t at = 0; at < bytes.size();) {
      const bool zero = IsZeroPage(&bytes[at]);
      size_t end = at + kPageSize;
      while (end < bytes.size() && IsZeroPage(&bytes[end]) == zero) end += kPageSize;
      const FileOffset offset = piece.offset + Bytes(at);
      if (!zero || zero_pages_ == ZeroPages::kKeep) {
        piece.output->AddRun({offset, offset + Bytes(end - at)});
      }
      if (!zero) UNMOOR_TRY(WriteRun(offset, bytes.subspan(at, end - at)));
      at = end;
    }
    return {};
  }

  [[nodiscard]] Result<> WriteRun(FileOffset offset, std::span<const std::byte> data) {
    UNMOOR_TRY(WriteExactlyAt(fd_, data, offset, path_));
    NoteDirty({offset, offset + Bytes(data.size())});
    return {};
  }

  void NoteDirty(FileRange range) {
    if (write_back_ == WriteBack::kLater) return;
    dirty_.begin = dirty_bytes_ == 0 ? range.begin : std::min(dirty_.begin, range.begin);
    dirty_.end = dirty_bytes_ == 0 ? range.end : std::max(dirty_.end, range.end);
    dirty_bytes_ += range.size().value;
    if (dirty_bytes_ < kWritebackStep) return;
    StartWriteback(fd_, dirty_.begin, dirty_.size());
    dirty_bytes_ = 0;
  }

  int fd_;
  std::string path_;
  WriteBack write_back_;
  ZeroPages zero_pages_;
  FileRange dirty_;
  uint64_t dirty_bytes_ = 0;
};

Result<> CheckVmas(uint32_t task_vpid, std::span<const VaddrRange> vmas) {
  Vaddr previous;
  for (const VaddrRange& vma : vmas) {
    if (vma.begin < previous || vma.empty()) {
      return MachineError("task {}: the VMA {} is out of order or empty", task_vpid, vma);
    }
    previous = vma.end;
  }
  return {};
}

}  // namespace

class LayerWriter::Impl {
 public:
  Impl(std::string id, std::string pages_path, std::string index_path, WriteBack write_back,
       ZeroPages zero_pages)
      : id_(std::move(id)),
        pages_path_(std::move(pages_path)),
        index_path_(std::move(index_path)),
        write_back_(write_back),
        zero_pages_(zero_pages) {}
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() { StopThread(true); }

  [[nodiscard]] Result<> Open() {
    UNMOOR_ASSIGN(pages_, OpenFile(pages_path_, O_RDWR | O_CREAT | O_EXCL, 0600));
    UNMOOR_ASSIGN(index_, OpenFile(index_path_, O_WRONLY | O_CREAT | O_EXCL, 0600));
    UNMOOR_TRY(ring_.Allocate());
    thread_ = std::thread([this] { Run(); });
    return {};
  }

  [[nodiscard]] Result<> AddTask(uint32_t task_vpid, std::span<const VaddrRange> vmas) {
    if (task_vpid == 0) return MachineError("pages of a task without a PID");
    if (tasks_.contains(task_vpid)) return MachineError("task {} came twice", task_vpid);
    if (extents_.size() + vmas.size() > kMaxExtents) {
      return MachineError("more than {} VMAs do not fit in a layer", kMaxExtents);
    }
    UNMOOR_TRY(CheckVmas(task_vpid, vmas));
    Task& task = tasks_[task_vpid];
    for (const VaddrRange& vma : vmas) {
      UNMOOR_ASSIGN(const FileOffset offset, layout_.Allocate(vma));
      task.extents.push_back({task_vpid, vma, offset, Bytes(0)});
      extents_.push_back(task.extents.back());
    }
    return {};
  }

  [[nodiscard]] Result<const Extent*> Find(uint32_t task_vpid, Vaddr at) const {
    const auto task = tasks_.find(task_vpid);
    if (task == tasks_.end()) return MachineError("pages of the unknown task {}", task_vpid);
    const auto& extents = task->second.extents;
    const auto after =
        std::ranges::upper_bound(extents, at, {}, [](const Extent& e) { return e.range.begin; });
    if (after == extents.begin() || !std::prev(after)->range.Contains(at)) {
      return MachineError("task {}: a page at {} lies in no mapped VMA", task_vpid, at);
    }
    return &*std::prev(after);
  }

  [[nodiscard]] Result<std::span<std::byte>> Reserve(uint32_t task_vpid, Vaddr at, Bytes want) {
    UNMOOR_ASSIGN(const Extent* extent, Find(task_vpid, at));
    Task& task = tasks_.at(task_vpid);
    if (at.value % kPageSize != 0 || want.value % kPageSize != 0 || want.value == 0 ||
        want > extent->range.end - at) {
      return MachineError("task {}: {} bytes at {} are no whole pages of the VMA {}", task_vpid,
                          want.value, at, extent->range);
    }
    if (at < task.next) return MachineError("task {}: the page at {} came late", task_vpid, at);
    const FileOffset offset = extent->offset + (at - extent->range.begin);
    const size_t block_left = kBufferSize - offset.value % kBufferSize;
    if (current_ != nullptr && ShouldSubmit(offset, std::min<size_t>(want.value, block_left))) {
      Submit();
    }
    if (current_ == nullptr) {
      UNMOOR_ASSIGN(current_, ring_.TakeEmpty());
    }
    reserved_at_ = at;
    reserved_task_ = &task;
    reserved_offset_ = offset;
    return current_->memory.writable_bytes().subspan(
        current_->used, std::min({want.value, block_left, kBufferSize - current_->used}));
  }

  [[nodiscard]] Result<> Commit(Bytes n) {
    UNMOOR_CHECK(reserved_task_ != nullptr && n.value % kPageSize == 0 &&
                 n.value <= kBufferSize - current_->used);
    if (n.value != 0) {
      current_->Append(&reserved_task_->output, reserved_offset_, n.value);
      reserved_task_->next = reserved_at_ + n;
    }
    reserved_task_ = nullptr;
    if (current_->used == kBufferSize) Submit();
    return {};
  }

  [[nodiscard]] int pages_fd() const { return pages_.get(); }

  [[nodiscard]] Result<LayerInfo> Snapshot() {
    if (current_ != nullptr) Submit();
    UNMOOR_TRY(ring_.AwaitIdle());
    // Pages of zeros at its end belong to segments, too.
    UNMOOR_TRY(Truncate(pages_.get(), layout_.file_size(), pages_path_));
    LayerInfo info;
    info.id = id_;
    info.file_size = layout_.file_size();
    CollectTables(info);
    return info;
  }

  [[nodiscard]] Result<LayerInfo> Finish(bool sync) {
    if (current_ != nullptr) Submit();
    StopThread(false);
    UNMOOR_TRY(ring_.status());
    UNMOOR_TRY(Truncate(pages_.get(), layout_.file_size(), pages_path_));
    if (sync) StartWriteback(pages_.get(), FileOffset(0), layout_.file_size());
    LayerInfo info;
    info.id = id_;
    info.file_size = layout_.file_size();
    CollectTables(info);
    UNMOOR_TRY(FinishLayer({pages_.get(), pages_path_, index_.get(), index_path_}, sync, info));
    return info;
  }

 private:
  // The writer thread. After an error it only gives buffers back.
  void Run() {
    PageSink sink(pages_.get(), pages_path_, write_back_, zero_pages_);
    bool failed = false;
    while (Buffer* buffer = ring_.TakeFull()) {
      Result<> result;
      if (!failed) result = sink.Write(*buffer);
      failed = failed || !result;
      ring_.GiveBack(buffer, std::move(result));
    }
  }

  // A block that may come whole gets a buffer of its own.
  [[nodiscard]] bool ShouldSubmit(FileOffset next, size_t size) const {
    const size_t used = current_->used;
    if (used == kBufferSize) return true;
    if (used == 0 || next.value % kBufferSize != 0) return false;
    const Piece& last = current_->pieces.back();
    return size > kBufferSize - used || last.offset + Bytes(last.size) == next;
  }

  void Submit() {
    ring_.Submit(current_);
    current_ = nullptr;
  }

  void StopThread(bool discard) {
    if (!thread_.joinable()) return;
    ring_.CloseInput(discard);
    thread_.join();
  }

  // Extents, segments and their sums, in file order.
  void CollectTables(LayerInfo& info) const {
    info.extents = extents_;
    for (Extent& extent : info.extents) {
      const auto& runs = tasks_.at(extent.task_vpid).output.runs;
      auto run = std::ranges::lower_bound(runs, extent.offset, {}, &FileRange::begin);
      for (; run != runs.end() && run->begin < extent.file_range().end; ++run) {
        const Vaddr begin = extent.range.begin + (run->begin - extent.offset);
        info.segments.push_back({extent.task_vpid, {begin, begin + run->size()}, run->begin});
        extent.data += run->size();
      }
      info.data_bytes += extent.data;
    }
  }

  const std::string id_;
  const std::string pages_path_;
  const std::string index_path_;
  const WriteBack write_back_;
  const ZeroPages zero_pages_;
  Fd pages_;
  Fd index_;
  LayoutAllocator layout_;
  std::vector<Extent> extents_;     // in file order
  std::map<uint32_t, Task> tasks_;  // nodes stay where they are: pieces point at them
  BufferRing ring_;
  std::thread thread_;
  Buffer* current_ = nullptr;
  Task* reserved_task_ = nullptr;
  Vaddr reserved_at_;
  FileOffset reserved_offset_;
};

LayerWriter::LayerWriter(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
LayerWriter::LayerWriter(LayerWriter&&) noexcept = default;
LayerWriter& LayerWriter::operator=(LayerWriter&&) noexcept = default;
LayerWriter::~LayerWriter() = default;

Result<LayerWriter> LayerWriter::Create(const std::string& directory, const std::string& id,
                                        WriteBack write_back, ZeroPages zero_pages) {
  UNMOOR_CHECK(IsValidId(id));
  if (!Exists(directory)) UNMOOR_TRY(MakeDirectory(directory, 0700));
  const std::string stem = directory + "/" + id;
  auto impl =
      std::make_unique<Impl>(id, fmt::format("{}{}", stem, kPagesSuffix),
                             fmt::format("{}{}", stem, kIndexSuffix), write_back, zero_pages);
  UNMOOR_TRY(impl->Open());
  return LayerWriter(std::move(impl));
}

Result<> LayerWriter::AddTask(uint32_t task_vpid, std::span<const VaddrRange> vmas) {
  return impl_->AddTask(task_vpid, vmas);
}

Result<VaddrRange> LayerWriter::VmaOf(uint32_t task_vpid, Vaddr at) const {
  UNMOOR_ASSIGN(const Extent* extent, impl_->Find(task_vpid, at));
  return extent->range;
}

Result<> LayerWriter::Write(uint32_t task_vpid, Vaddr at, std::span<const std::byte> pages) {
  while (!pages.empty()) {
    UNMOOR_ASSIGN(const auto room, impl_->Reserve(task_vpid, at, Bytes(pages.size())));
    std::memcpy(room.data(), pages.data(), room.size());
    UNMOOR_TRY(impl_->Commit(Bytes(room.size())));
    pages = pages.subspan(room.size());
    at = at + Bytes(room.size());
  }
  return {};
}

Result<std::span<std::byte>> LayerWriter::Reserve(uint32_t task_vpid, Vaddr at, Bytes want) {
  return impl_->Reserve(task_vpid, at, want);
}

Result<> LayerWriter::Commit(Bytes n) {
  return impl_->Commit(n);
}

Result<LayerInfo> LayerWriter::Snapshot() {
  return impl_->Snapshot();
}

int LayerWriter::pages_fd() const {
  return impl_->pages_fd();
}

Result<LayerInfo> LayerWriter::Finish(bool sync) {
  return impl_->Finish(sync);
}

}  // namespace unmoor
