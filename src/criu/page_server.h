// Being CRIU's page server at dump: what `criu dump --page-server --ps-socket N` talks to.
//
// CRIU sends, for each task and each shared memory segment, a stream of "these pages at this
// address", one stream after another, and at the very end one closing message. The answer to that
// decides the dump: 0 lets CRIU go on and kill the program, anything else makes it thaw the program
// and fail. CRIU sends the closing message on its own failures too, so PageSink::Close says "your
// pages are safe", never "publish"; publish after criu's exit code 0.
//
// Failure: CRIU has to reach its own clean-up, which takes its code out of the program and thaws
// it. So after any error, the sink's or the stream's, Run goes on reading and discarding, answers
// nothing but end of stream, which fails the dump, and returns the first error when CRIU has hung
// up.
//
// Run belongs to one thread; Abort may be called from any.
#pragma once

#include <atomic>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor::criu {

enum class StreamKind : uint8_t { kTask = 1, kSharedMemory = 2 };

// Whose pages: a task by its virtual pid, or a shared memory segment by CRIU's id.
struct PageStreamId {
  StreamKind kind = StreamKind::kTask;
  uint64_t id = 0;
  auto operator<=>(const PageStreamId&) const = default;
};
// "task 123", "shared memory 45".
[[nodiscard]] std::string ToString(PageStreamId id);

// Flags of a pagemap entry.
inline constexpr uint32_t kPageInParent = 1;
inline constexpr uint32_t kPageLazy = 2;
inline constexpr uint32_t kPagePresent = 4;

// Where the pages go. Addresses within one stream ascend; for shared memory the "address" is the
// offset in the segment. Called from the thread of PageServer::Run only; after an error never
// again.
class PageSink {
 public:
  virtual ~PageSink() = default;
  // The task is frozen from before this call until its stream's end.
  [[nodiscard]] virtual Result<> Open(PageStreamId id) = 0;
  // Whole pages. A run longer than PageServer::kChunk comes in several calls.
  [[nodiscard]] virtual Result<> Pages(PageStreamId id, Vaddr at, uint32_t flags,
                                       std::span<const std::byte> data) = 0;
  // Where the sink would have such a run itself, so that nothing is copied on the way: room for
  // some whole pages of it, at most `want`; empty: nowhere, it comes by Pages. Once it is filled it
  // is handed over by Filled, before any other call.
  [[nodiscard]] virtual Result<std::span<std::byte>> Room(PageStreamId /*id*/, Vaddr /*at*/,
                                                          Bytes /*want*/) {
    return std::span<std::byte>();
  }
  [[nodiscard]] virtual Result<> Filled(PageStreamId /*id*/, Vaddr /*at*/, Bytes /*size*/) {
    return {};
  }
  // An entry without pages (kPageInParent or kPageLazy without kPagePresent).
  [[nodiscard]] virtual Result<> Absent(PageStreamId id, VaddrRange range, uint32_t flags) = 0;
  // Success promises that everything received is durable.
  [[nodiscard]] virtual Result<> Close() = 0;
};

class PageServer {
 public:
  static constexpr Bytes kChunk{uint64_t{1} << 20};

  // `socket`: our end of a connected stream socket.
  PageServer(Fd socket, PageSink& sink);

  // Serves until CRIU has hung up. Success only when Close of the sink succeeded and was answered
  // 0.
  [[nodiscard]] Result<> Run();

  // Makes the dump fail as soon as possible and the program run on: Run will not answer CRIU any
  // more and returns an error saying `why`. Once the closing message was answered it has no effect.
  void Abort(const std::string& why);

  // Bytes of pages received so far; for progress, from any thread.
  [[nodiscard]] Bytes received() const { return Bytes(received_.load(std::memory_order_relaxed)); }

 private:
  struct Header;
  [[nodiscard]] Result<> Serve();
  [[nodiscard]] Result<Header> ReadHeader();
  [[nodiscard]] Result<bool> Handle(const Header& header);
  [[nodiscard]] Result<> ReceivePages(const Header& header, PageStreamId id, uint32_t flags);
  [[nodiscard]] Result<size_t> ReceiveRun(PageStreamId id, Vaddr at, uint32_t flags, uint64_t left);
  [[nodiscard]] Result<> Receive(std::span<std::byte> data,
                                 const std::function<std::string()>& what);
  [[nodiscard]] Result<> EnsureOpen(PageStreamId id);

  Fd socket_;
  PageSink& sink_;
  std::vector<std::byte> ahead_;  // what was read at once
  std::span<std::byte> unread_;   // the rest of it
  std::vector<std::byte> buffer_;
  std::optional<PageStreamId> open_;
  std::optional<bool> old_headers_;  // known from the first message on
  std::atomic<uint64_t> received_{0};
  std::atomic<bool> aborted_{false};
  std::mutex abort_mutex_;
  std::string abort_reason_;  // written once, under the lock, before aborted_ becomes true
};

}  // namespace unmoor::criu
