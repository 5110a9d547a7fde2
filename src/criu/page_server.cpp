// See page_server.h.
//
// A message is a header, for page-adding commands with kPagePresent followed by the pages. Two
// forms of header exist, told apart once, at the first message (which has no address):
//   up to 4.1:  u32 command, u32 pages, u64 address, u64 stream
//   from 4.2:   u32 command, u32 unused, u64 pages, u64 address, u64 stream
#include "criu/page_server.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "os/file.h"
#include "os/socket.h"

namespace unmoor::criu {
namespace {

enum Command : uint32_t {
  kAdd = 1,
  kHole = 2,
  kOpen = 3,
  kOpen2 = 4,
  kParent = 5,
  kAddFlags = 6,
  kGet = 7,
  kClose = 0x1023,
  kForceClose = 0x1024,
};
constexpr uint32_t kCommandBits = 16;
constexpr uint32_t kCommandMask = (1u << kCommandBits) - 1;

constexpr size_t kOldHeader = 24;
constexpr size_t kNewHeader = 32;

constexpr size_t kAhead = size_t{128} << 10;  // read at once, while runs are short

// 57 address bits, as with five-level page tables.
constexpr uint64_t kMaxAddress = uint64_t{1} << 57;

const std::string kPeer = "criu's page stream";

template <class T>
T Load(std::span<const std::byte> data, size_t offset) {
  T value;
  std::memcpy(&value, data.data() + offset, sizeof value);
  return value;
}

Result<PageStreamId> DecodeStream(uint64_t encoded) {
  const uint64_t kind = encoded & 0xff;
  if (kind != static_cast<uint64_t>(StreamKind::kTask) &&
      kind != static_cast<uint64_t>(StreamKind::kSharedMemory)) {
    return MachineError("{}: unknown kind {} of page stream (id {:#x}); this criu is not supported",
                        kPeer, kind, encoded);
  }
  return PageStreamId{static_cast<StreamKind>(kind), encoded >> 8};
}

}  // namespace

struct PageServer::Header {
  uint32_t command = 0;
  uint32_t flags = 0;
  uint64_t pages = 0;
  uint64_t address = 0;
  uint64_t stream = 0;
  [[nodiscard]] bool closing() const { return command == kClose || command == kForceClose; }
};

std::string ToString(PageStreamId id) {
  return fmt::format("{} {}", id.kind == StreamKind::kTask ? "task" : "shared memory", id.id);
}

PageServer::PageServer(Fd socket, PageSink& sink) : socket_(std::move(socket)), sink_(sink) {}

Result<> PageServer::Run() {
  buffer_.resize(kChunk.value);
  ahead_.resize(kAhead);
  Result<> result = Serve();
  if (!result) {
    ShutdownWrite(socket_.get());
    DiscardStream(socket_.get(), buffer_);
    if (aborted_.load(std::memory_order_acquire)) return MachineError("{}", abort_reason_);
  }
  return result;
}

void PageServer::Abort(const std::string& why) {
  const std::scoped_lock lock(abort_mutex_);
  if (aborted_.load(std::memory_order_relaxed)) return;
  abort_reason_ = why;
  aborted_.store(true, std::memory_order_release);
  ShutdownWrite(socket_.get());
}

Result<> PageServer::Serve() {
  for (;;) {
    UNMOOR_ASSIGN(const Header header, ReadHeader());
    UNMOOR_ASSIGN(const bool closed, Handle(header));
    if (closed) return {};
    if (aborted_.load(std::memory_order_acquire)) return MachineError("{}", abort_reason_);
  }
}

Result<PageServer::Header> PageServer::ReadHeader() {
  std::array<std::byte, kNewHeader> bytes{};
  UNMOOR_TRY(Receive(std::span(bytes).first(kOldHeader), [] { return "the header of a message"; }));
  const uint32_t word = Load<uint32_t>(bytes, 0);
  Header header;
  header.command = word & kCommandMask;
  header.flags = word >> kCommandBits;
  // Nothing follows a closing message, so its form (unknown if it is the first) does not matter.
  if (header.closing()) return header;
  if (!old_headers_) old_headers_ = Load<uint64_t>(bytes, 16) != 0;
  if (*old_headers_) {
    header.pages = Load<uint32_t>(bytes, 4);
    header.address = Load<uint64_t>(bytes, 8);
    header.stream = Load<uint64_t>(bytes, 16);
    return header;
  }
  UNMOOR_TRY(Receive(std::span(bytes).subspan(kOldHeader),
                     [] { return "the end of a message's header"; }));
  header.pages = Load<uint64_t>(bytes, 8);
  header.address = Load<uint64_t>(bytes, 16);
  header.stream = Load<uint64_t>(bytes, 24);
  return header;
}

// True: it was the closing message, and it was answered.
Result<bool> PageServer::Handle(const Header& header) {
  if (header.closing()) {
    UNMOOR_TRY(sink_.Close());
    const int32_t answer = 0;
    UNMOOR_TRY(SendAll(socket_.get(), std::as_bytes(std::span(&answer, 1)), kPeer));
    return true;
  }
  UNMOOR_ASSIGN(const PageStreamId id, DecodeStream(header.stream));
  switch (header.command) {
    case kOpen:
    case kOpen2:
      open_.reset();
      UNMOOR_TRY(EnsureOpen(id));
      if (header.command == kOpen2) {
        const std::byte has_parent{0};
        UNMOOR_TRY(SendAll(socket_.get(), std::span(&has_parent, 1), kPeer));
      }
      return false;
    case kParent: {
      const int32_t has_parent = 0;
      UNMOOR_TRY(SendAll(socket_.get(), std::as_bytes(std::span(&has_parent, 1)), kPeer));
      return false;
    }
    case kAdd:
      UNMOOR_TRY(ReceivePages(header, id, kPagePresent));
      return false;
    case kAddFlags:
      UNMOOR_TRY(ReceivePages(header, id, header.flags));
      return false;
    case kHole:
      UNMOOR_TRY(ReceivePages(header, id, kPageInParent));
      return false;
    case kGet:
      return MachineError(
          "{}: criu asks for pages (lazy pages), which a dump through unmoor does not serve; "
          "leave out --lazy-pages",
          kPeer);
    default:
      return MachineError("{}: unknown command {:#x}; this criu is not supported", kPeer,
                          header.command);
  }
}

Result<> PageServer::EnsureOpen(PageStreamId id) {
  if (open_ == id) return {};
  UNMOOR_TRY(sink_.Open(id));
  open_ = id;
  return {};
}

Result<> PageServer::ReceivePages(const Header& header, PageStreamId id, uint32_t flags) {
  if (header.address % kPageSize != 0 || header.address >= kMaxAddress || header.pages == 0 ||
      header.pages > (kMaxAddress - header.address) / kPageSize) {
    return MachineError("{}: {} pages at {:#x} of {} are no range of memory", kPeer, header.pages,
                        header.address, ToString(id));
  }
  UNMOOR_TRY(EnsureOpen(id));
  const Vaddr begin(header.address);
  uint64_t left = header.pages * kPageSize;
  if ((flags & kPagePresent) == 0) return sink_.Absent(id, {begin, begin + Bytes(left)}, flags);
  for (Vaddr at = begin; left != 0;) {
    UNMOOR_ASSIGN(const size_t size, ReceiveRun(id, at, flags, left));
    at = at + Bytes(size);
    left -= size;
  }
  return {};
}

// Some pages of a run; long ones are received where the sink wants to have them.
Result<size_t> PageServer::ReceiveRun(PageStreamId id, Vaddr at, uint32_t flags, uint64_t left) {
  const auto what = [&] { return fmt::format("the pages at {} of {}", at, ToString(id)); };
  std::span<std::byte> chunk;
  if (left >= kAhead) {
    UNMOOR_ASSIGN(chunk, sink_.Room(id, at, Bytes(left)));
  }
  const bool in_place = !chunk.empty();
  if (!in_place) chunk = std::span(buffer_).first(std::min<uint64_t>(left, kChunk.value));
  UNMOOR_TRY(Receive(chunk, what));
  received_.fetch_add(chunk.size(), std::memory_order_relaxed);
  UNMOOR_TRY(in_place ? sink_.Filled(id, at, Bytes(chunk.size()))
                      : sink_.Pages(id, at, flags, chunk));
  return chunk.size();
}

// Small messages many at a time; the bulk straight to where it belongs.
Result<> PageServer::Receive(std::span<std::byte> data, const std::function<std::string()>& what) {
  const size_t size = data.size();
  while (!data.empty()) {
    if (unread_.empty() && data.size() < kAhead) {
      UNMOOR_ASSIGN(const size_t n, ReceiveSome(socket_.get(), ahead_, kPeer));
      unread_ = std::span(ahead_).first(n);
      if (n == 0) break;
    }
    size_t n = std::min(unread_.size(), data.size());
    if (n != 0) {
      std::memcpy(data.data(), unread_.data(), n);
      unread_ = unread_.subspan(n);
    } else {
      UNMOOR_ASSIGN(n, ReceiveSome(socket_.get(), data, kPeer));
      if (n == 0) break;
    }
    data = data.subspan(n);
  }
  if (data.empty()) return {};
  return MachineError("criu hung up in its page stream: {} of {} bytes of {} came",
                      size - data.size(), size, what());
}

}  // namespace unmoor::criu
