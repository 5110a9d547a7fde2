// See write_ring.h.
#include "os/write_ring.h"

#include <liburing.h>

#include <cerrno>
#include <cstdlib>
#include <optional>
#include <vector>

#include "os/fd.h"
#include "os/file.h"
#include "os/file_hook.h"

namespace unmoor {
namespace {

constexpr unsigned kEntries = 64;

}  // namespace

class WriteRing::Impl {
 public:
  Impl(int fd, std::string name) : fd_(fd), name_(std::move(name)) {}
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    if (!ring_ready_) return;
    (void)Drain();
    ::io_uring_queue_exit(&ring_);
  }

  [[nodiscard]] Result<> Open(size_t buffer_size, unsigned count) {
    buffers_.resize(count);
    std::vector<iovec> list;
    for (Buffer& buffer : buffers_) {
      UNMOOR_ASSIGN(buffer.memory, Mapping::Anonymous(buffer_size));
      list.push_back({buffer.memory.writable_bytes().data(), buffer_size});
    }
    // UNMOOR_NO_IO_URING: for tests of the way without it.
    ring_ready_ = std::getenv("UNMOOR_NO_IO_URING") == nullptr &&
                  BeforeFileCall("io_uring_setup", fd_, name_) == 0 &&
                  ::io_uring_queue_init(kEntries, &ring_, 0) == 0;
    // Not fatal: a small RLIMIT_MEMLOCK of an unprivileged user forbids it.
    registered_ = ring_ready_ && ::io_uring_register_buffers(&ring_, list.data(), count) == 0;
    return {};
  }

  [[nodiscard]] Result<std::span<std::byte>> Take() {
    UNMOOR_TRY(status());
    for (;;) {
      for (size_t i = 0; i < buffers_.size(); ++i) {
        const size_t candidate = (taken_ + 1 + i) % buffers_.size();
        if (!buffers_[candidate].writes.empty()) continue;
        taken_ = candidate;
        return buffers_[taken_].memory.writable_bytes();
      }
      UNMOOR_TRY(AwaitOne());
    }
  }

  [[nodiscard]] Result<> Write(std::span<const std::byte> part, FileOffset offset) {
    UNMOOR_TRY(status());
    if (!ring_ready_) return Keep(WriteExactlyAt(fd_, part, offset, name_));
    if (under_way_ == kEntries) UNMOOR_TRY(AwaitOne());
    io_uring_sqe* const entry = ::io_uring_get_sqe(&ring_);
    UNMOOR_CHECK(entry != nullptr);
    Buffer& buffer = buffers_[taken_];
    const auto length = static_cast<unsigned>(part.size());
    const int failure = BeforeFileCall("io_uring write", fd_, name_);
    if (failure != 0) {
      ::io_uring_prep_nop(entry);  // told of when it completes, as a real failure is
    } else if (registered_) {
      ::io_uring_prep_write_fixed(entry, fd_, part.data(), length, offset.value,
                                  static_cast<int>(taken_));
    } else {
      ::io_uring_prep_write(entry, fd_, part.data(), length, offset.value);
    }
    const uint64_t number = next_number_++;
    entry->user_data = number;
    buffer.writes.push_back({number, part, offset, failure});
    ++under_way_;
    int submitted = 0;
    do {
      submitted = ::io_uring_submit(&ring_);
    } while (submitted == -EINTR || submitted == -EAGAIN);
    if (submitted == 1) return {};
    // Nothing was started: the write is still ours to do.
    buffer.writes.pop_back();
    --under_way_;
    return Keep(SystemError(-submitted, fmt::format("cannot write {} by io_uring", name_)));
  }

  [[nodiscard]] Result<> Drain() {
    while (under_way_ > 0) {
      // An error is kept, and the rest still waited for: the kernel reads our buffers until then.
      if (!AwaitOne() && stuck_) break;
    }
    return status();
  }

 private:
  struct Pending {
    uint64_t number;
    std::span<const std::byte> part;
    FileOffset offset;
    int failure;  // the hook's
  };
  struct Buffer {
    Mapping memory;
    std::vector<Pending> writes;  // under way
  };

  [[nodiscard]] Result<> status() const {
    if (error_) return Failure(*error_);
    return {};
  }
  Result<> Keep(Result<> result) {
    if (!result && !error_) error_ = result.error();
    return result;
  }

  [[nodiscard]] Result<> AwaitOne() {
    io_uring_cqe* done = nullptr;
    int waited = 0;
    do {
      waited = ::io_uring_wait_cqe(&ring_, &done);
    } while (waited == -EINTR);
    if (waited != 0) {
      stuck_ = true;
      return Keep(SystemError(-waited, fmt::format("cannot wait for writes to {}", name_)));
    }
    const uint64_t number = done->user_data;
    const int result = done->res;
    ::io_uring_cqe_seen(&ring_, done);
    --under_way_;
    return Keep(Complete(number, result));
  }

  [[nodiscard]] Result<> Complete(uint64_t number, int result) {
    for (Buffer& buffer : buffers_) {
      for (size_t i = 0; i < buffer.writes.size(); ++i) {
        if (buffer.writes[i].number != number) continue;
        const Pending pending = buffer.writes[i];
        if (pending.failure != 0) result = -pending.failure;
        buffer.writes.erase(buffer.writes.begin() + static_cast<ptrdiff_t>(i));
        if (result < 0 && result != -EINTR && result != -EAGAIN) {
          return SystemError(-result, fmt::format("cannot write {}", name_));
        }
        // A short write: the rest goes the ordinary way, which also tells why.
        const auto written = static_cast<size_t>(result < 0 ? 0 : result);
        return WriteExactlyAt(fd_, pending.part.subspan(written), pending.offset + Bytes(written),
                              name_);
      }
    }
    return MachineError("io_uring told of a write to {} that was not asked for", name_);
  }

  int fd_;
  std::string name_;
  io_uring ring_{};
  bool ring_ready_ = false;
  bool registered_ = false;
  bool stuck_ = false;
  std::vector<Buffer> buffers_;
  size_t taken_ = 0;
  unsigned under_way_ = 0;
  uint64_t next_number_ = 0;
  std::optional<Error> error_;
};

WriteRing::WriteRing(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
WriteRing::WriteRing(WriteRing&&) noexcept = default;
WriteRing::~WriteRing() = default;

Result<WriteRing> WriteRing::Create(int fd, std::string name, size_t buffer_size, unsigned count) {
  auto impl = std::make_unique<Impl>(fd, std::move(name));
  UNMOOR_TRY(impl->Open(buffer_size, count));
  return WriteRing(std::move(impl));
}

Result<std::span<std::byte>> WriteRing::Take() {
  return impl_->Take();
}

Result<> WriteRing::Write(std::span<const std::byte> part, FileOffset offset) {
  return impl_->Write(part, offset);
}

Result<> WriteRing::Finish() {
  return impl_->Drain();
}

}  // namespace unmoor
