// The worker's end of the line to a helper: operation lists out, replies in.
//
// Belongs to one thread. A helper that ended shows as an error with errnum EPIPE.
#pragma once

#include <array>
#include <functional>
#include <span>
#include <vector>

#include "agent/helper_protocol.h"
#include "agent/inject.h"
#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

// Operation lists, readably made.
class OpList {
 public:
  OpList& Syscall(long number, std::array<uint64_t, 6> args, bool may_fail = false);
  OpList& Ioctl(int fd, unsigned long request, std::array<uint64_t, 5> argument);
  OpList& Move(int staging, Vaddr dst, Vaddr src, Bytes length);
  OpList& Copy(Vaddr dst, VaddrRange src);
  OpList& Pread(int fd, Vaddr dst, Bytes length, FileOffset offset);
  OpList& Freeze(int task_directory, Nanos limit, bool nested, int uffd, bool guarded);
  OpList& CheckVma(int maps, VaddrRange range, int prot, uint64_t inode, uint64_t offset,
                   uint32_t dev_major, uint32_t dev_minor);
  OpList& Recheck(int pagemap, VaddrRange range, Vaddr mirror, PageCount limit, bool all);
  OpList& Hold(int task_directory, Nanos limit, bool nested);
  OpList& Thaw();
  OpList& GuardPiece(VaddrRange range, int prot);
  OpList& Guard(int task_directory, Nanos limit);
  OpList& Deadline(Nanos limit);

  [[nodiscard]] std::span<const helper::Op> ops() const { return ops_; }
  [[nodiscard]] size_t size() const { return ops_.size(); }
  void clear() { ops_.clear(); }

 private:
  OpList& Add(helper::OpKind kind, std::array<uint64_t, 7> args, bool may_fail = false);
  std::vector<helper::Op> ops_;
};

class HelperLink {
 public:
  HelperLink() = default;
  // Waits until the helper serves and takes the socket's other end. `first` gets what has to begin
  // the first list: until then the helper would not see our death.
  [[nodiscard]] static Result<HelperLink> Connect(Pid program, const HelperProcess& helper,
                                                  OpList& first);

  [[nodiscard]] bool connected() const { return socket_.valid(); }
  [[nodiscard]] const HelperProcess& helper() const { return helper_; }
  [[nodiscard]] int pidfd() const { return pidfd_.get(); }
  void Close() { socket_.Reset(); }

  // Runs the list; lists longer than a message are cut, unless they hold a Freeze, which must fit.
  [[nodiscard]] Result<helper::Reply> Run(const OpList& list);
  // As Run; `meanwhile` is called once the helper is at work.
  [[nodiscard]] Result<helper::Reply> RunBeside(const OpList& list,
                                                const std::function<void()>& meanwhile);
  // As Run; meanwhile `on_readable` is called whenever `fd` is readable.
  [[nodiscard]] Result<helper::Reply> RunReading(const OpList& list, int fd,
                                                 const std::function<Result<>()>& on_readable);
  // As Run, and a failed operation is an error ("what: Cannot allocate memory").
  [[nodiscard]] Result<int64_t> Must(const OpList& list, const char* what);
  // As Run, for a short list; the helper gets copies of `fds`, whose numbers there the reply has.
  [[nodiscard]] Result<helper::Reply> RunGiving(const OpList& list, std::span<const int> fds);
  // Gives the helper a copy of `fd`; returns its number there.
  [[nodiscard]] Result<int> GiveFd(int fd);
  // A copy of the helper's descriptor.
  [[nodiscard]] Result<Fd> TakeFd(int fd) const;

 private:
  [[nodiscard]] Result<> SendOps(std::span<const helper::Op> ops, std::span<const int> passed_fds);
  [[nodiscard]] Result<helper::Reply> RunMessage(std::span<const helper::Op> ops,
                                                 std::span<const int> passed_fds,
                                                 const std::function<void()>& meanwhile = {});
  [[nodiscard]] Result<helper::Reply> ReceiveReply();
  [[nodiscard]] Result<helper::Reply> NoAnswer();

  HelperProcess helper_;
  Fd pidfd_;
  Fd socket_;
};

}  // namespace unmoor
