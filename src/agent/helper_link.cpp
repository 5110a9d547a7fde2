// See helper_link.h.
#include "agent/helper_link.h"

#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstring>

#include "os/backoff.h"
#include "os/daemon.h"
#include "os/process_control.h"
#include "os/remote_memory.h"
#include "os/socket.h"

namespace unmoor {

constexpr Nanos kStopPatience(3'000'000'000);
constexpr Nanos kCopyPatience(60'000'000'000);
constexpr const char* kHelperEnded = "the helper ended";

using helper::Op;
using helper::OpKind;
using helper::Reply;

OpList& OpList::Add(OpKind kind, std::array<uint64_t, 7> args, bool may_fail) {
  Op op{kind, may_fail ? helper::kOpMayFail : 0, {}};
  std::ranges::copy(args, op.args);
  ops_.push_back(op);
  return *this;
}

OpList& OpList::Syscall(long number, std::array<uint64_t, 6> args, bool may_fail) {
  return Add(OpKind::kSyscall,
             {static_cast<uint64_t>(number), args[0], args[1], args[2], args[3], args[4], args[5]},
             may_fail);
}
OpList& OpList::Ioctl(int fd, unsigned long request, std::array<uint64_t, 5> a) {
  return Add(OpKind::kIoctl, {static_cast<uint64_t>(fd), request, a[0], a[1], a[2], a[3], a[4]});
}
OpList& OpList::Move(int staging, Vaddr dst, Vaddr src, Bytes length) {
  return Add(OpKind::kMove,
             {static_cast<uint64_t>(staging), dst.value, src.value, length.value, 0, 0, 0});
}
OpList& OpList::Copy(Vaddr dst, VaddrRange src) {
  return Add(OpKind::kCopy, {dst.value, src.begin.value, src.size().value, 0, 0, 0, 0});
}
OpList& OpList::Pread(int fd, Vaddr dst, Bytes length, FileOffset offset) {
  return Add(OpKind::kPread,
             {static_cast<uint64_t>(fd), dst.value, length.value, offset.value, 0, 0, 0});
}
OpList& OpList::Freeze(int task_directory, Nanos limit, bool nested, int uffd, bool guarded) {
  return Add(OpKind::kFreeze, {static_cast<uint64_t>(task_directory),
                               static_cast<uint64_t>(limit.value), nested ? uint64_t{1} : 0,
                               static_cast<uint64_t>(uffd), guarded ? uint64_t{1} : 0, 0, 0});
}
OpList& OpList::CheckVma(int maps, VaddrRange range, int prot, uint64_t inode, uint64_t offset,
                         uint32_t dev_major, uint32_t dev_minor) {
  return Add(OpKind::kCheckVma,
             {static_cast<uint64_t>(maps), range.begin.value, range.end.value,
              static_cast<uint64_t>(prot), inode, offset, uint64_t{dev_major} << 32 | dev_minor});
}
OpList& OpList::Recheck(int pagemap, VaddrRange range, Vaddr mirror, PageCount limit, bool all) {
  return Add(OpKind::kRecheck,
             {static_cast<uint64_t>(pagemap), range.begin.value, range.end.value,
              mirror.value - range.begin.value, limit.value, all ? uint64_t{1} : 0, 0});
}
OpList& OpList::Hold(int task_directory, Nanos limit, bool nested) {
  return Add(OpKind::kHold,
             {static_cast<uint64_t>(task_directory), static_cast<uint64_t>(limit.value),
              nested ? uint64_t{1} : 0, 0, 0, 0, 0});
}
OpList& OpList::Thaw() {
  return Add(OpKind::kThaw, {});
}
OpList& OpList::GuardPiece(VaddrRange range, int prot) {
  return Add(OpKind::kGuardPiece,
             {range.begin.value, range.size().value, static_cast<uint64_t>(prot), 0, 0, 0, 0});
}
OpList& OpList::Guard(int task_directory, Nanos limit) {
  return Add(OpKind::kGuard,
             {static_cast<uint64_t>(task_directory), static_cast<uint64_t>(limit.value)});
}
OpList& OpList::Deadline(Nanos limit) {
  return Add(OpKind::kDeadline, {static_cast<uint64_t>(limit.value)});
}

Result<HelperLink> HelperLink::Connect(Pid program, const HelperProcess& helper, OpList& first) {
  HelperLink link;
  link.helper_ = helper;
  UNMOOR_ASSIGN(link.pidfd_, OpenPidFd(helper.pid));
  const Vaddr data = helper.region + Bytes(helper::kCodeSize);
  struct Head {
    char magic[16];
    uint32_t version, state;
    int32_t helper_tid, socket, worker_socket, start_error;
  } head{};
  static_assert(offsetof(Head, start_error) == offsetof(helper::Data, start_error));
  constexpr Nanos kLimit(2'000'000'000);
  const Nanos began = MonotonicNow();
  for (int turn = 0;; ++turn) {
    UNMOOR_TRY(ReadMemory(program, data, std::as_writable_bytes(std::span(&head, 1))));
    if (head.state == 1) break;
    if (head.state == 2 || MonotonicNow() - began > kLimit) {
      return MachineError("the helper in process {} did not start", program.value);
    }
    WaitALittle(turn);
  }
  if (head.start_error != 0) return SystemError(head.start_error, "the helper's socket");
  UNMOOR_ASSIGN(link.socket_, unmoor::TakeFd(link.pidfd_.get(), head.worker_socket));
  first.Syscall(SYS_close, {static_cast<uint64_t>(head.worker_socket), 0, 0, 0, 0, 0});
  return link;
}

Result<> HelperLink::SendOps(std::span<const Op> ops, std::span<const int> passed_fds) {
  std::vector<std::byte> message(sizeof(helper::MessageHeader) + ops.size_bytes());
  const helper::MessageHeader header{static_cast<uint32_t>(ops.size()), 0};
  std::memcpy(message.data(), &header, sizeof(header));
  std::memcpy(message.data() + sizeof(header), ops.data(), ops.size_bytes());
  const auto sent = SendMessage(socket_.get(), message, passed_fds, "the helper");
  if (!sent && sent.error().errnum() == ECONNRESET) return SystemError(EPIPE, kHelperEnded);
  return sent;
}

Result<Reply> HelperLink::RunMessage(std::span<const Op> ops, std::span<const int> passed_fds,
                                     const std::function<void()>& meanwhile) {
  UNMOOR_TRY(SendOps(ops, passed_fds));
  if (meanwhile) meanwhile();
  // A helper can wait for ever only where the kernel makes it (seizing a thread whose process is in
  // exec waits for threads that only the helper could release). Its end resolves that.
  const bool stops = std::ranges::any_of(
      ops, [](const Op& op) { return op.kind == OpKind::kFreeze || op.kind == OpKind::kHold; });
  UNMOOR_ASSIGN(const bool answered,
                WaitReadable(socket_.get(), stops ? kStopPatience : kCopyPatience));
  return answered ? ReceiveReply() : NoAnswer();
}

Result<Reply> HelperLink::RunReading(const OpList& list, int fd,
                                     const std::function<Result<>()>& on_readable) {
  UNMOOR_CHECK(list.size() <= helper::kMaxOps);
  UNMOOR_TRY(SendOps(list.ops(), {}));
  const Nanos began = MonotonicNow();
  while (MonotonicNow() - began < kStopPatience) {
    UNMOOR_ASSIGN(const std::vector<int> ready,
                  WaitAnyReadable({socket_.get(), fd}, kStopPatience));
    if (std::ranges::find(ready, socket_.get()) != ready.end()) return ReceiveReply();
    if (!ready.empty()) UNMOOR_TRY(on_readable());
  }
  return NoAnswer();
}

Result<Reply> HelperLink::NoAnswer() {
  (void)SendSignal(helper_.pid, SIGKILL);
  return SystemError(EPIPE, "the helper did not answer");
}

Result<Reply> HelperLink::ReceiveReply() {
  Reply reply{};
  const auto received =
      ReceiveMessage(socket_.get(), std::as_writable_bytes(std::span(&reply, 1)), "the helper");
  // Reset: it ended without reading what we had sent.
  const bool reset = !received && received.error().errnum() == ECONNRESET;
  if (!received && !reset) return Failure(received.error());
  if (reset || received->size != sizeof(reply)) return SystemError(EPIPE, kHelperEnded);
  return reply;
}

Result<Reply> HelperLink::Run(const OpList& list) {
  return RunBeside(list, {});
}

Result<Reply> HelperLink::RunBeside(const OpList& list, const std::function<void()>& meanwhile) {
  std::span<const Op> rest = list.ops();
  Reply total{};
  do {
    const auto part = rest.first(std::min(rest.size(), helper::kMaxOps));
    rest = rest.subspan(part.size());
    const bool first = part.data() == list.ops().data();
    UNMOOR_ASSIGN(const Reply reply,
                  RunMessage(part, {}, first ? meanwhile : std::function<void()>()));
    const uint32_t done = total.done + reply.done;
    total = reply;
    total.done = done;
  } while (!rest.empty() && total.error == 0);
  return total;
}

Result<int64_t> HelperLink::Must(const OpList& list, const char* what) {
  UNMOOR_ASSIGN(const Reply reply, Run(list));
  if (reply.error != 0) return SystemError(reply.error, what);
  return reply.result;
}

Result<Reply> HelperLink::RunGiving(const OpList& list, std::span<const int> fds) {
  UNMOOR_CHECK(list.size() <= helper::kMaxOps && fds.size() <= helper::kMaxPassed);
  UNMOOR_ASSIGN(const Reply reply, RunMessage(list.ops(), fds));
  for (size_t i = 0; i < fds.size(); ++i) {
    if (reply.received_fds[i] < 0) return MachineError("the helper got no descriptor");
  }
  return reply;
}

Result<int> HelperLink::GiveFd(int fd) {
  UNMOOR_ASSIGN(const Reply reply, RunGiving({}, std::array{fd}));
  return reply.received_fds[0];
}

Result<Fd> HelperLink::TakeFd(int fd) const {
  return unmoor::TakeFd(pidfd_.get(), fd);
}

}  // namespace unmoor
