// What /proc tells about other processes: VMAs, threads, children, ids, state.
//
// Every function reads the files afresh; a process that ends meanwhile gives an error whose errnum
// is ESRCH or ENOENT.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

// One line of /proc/PID/maps, and what smaps adds.
struct VmaInfo {
  VaddrRange range;
  int prot = 0;  // PROT_READ | PROT_WRITE | PROT_EXEC
  bool shared = false;
  FileOffset offset;
  uint32_t dev_major = 0;
  uint32_t dev_minor = 0;
  uint64_t inode = 0;
  std::string name;  // path, "[heap]", "[stack]", "[anon:…]", "" for plain anonymous memory

  // From smaps only; empty or zero after ReadMaps.
  std::vector<std::string> vm_flags;  // two-letter names: "rd", "wr", "hg" …
  Bytes rss;
  Bytes anonymous;
  Bytes anon_huge_pages;
  Bytes locked;

  [[nodiscard]] bool HasFlag(std::string_view flag) const;
  // Private and without a file: "", "[heap]", "[stack]", "[anon:…]".
  [[nodiscard]] bool IsPrivateAnonymous() const;
};

// Ascending and disjoint. The kernel hands the list out in parts: of a process that runs it is no
// picture of one moment. What moves or is mapped anew meanwhile may be missing; what shows twice is
// here once.
[[nodiscard]] Result<std::vector<VmaInfo>> ReadMaps(Pid pid);
[[nodiscard]] Result<std::vector<VmaInfo>> ReadSmaps(Pid pid);
// The same of such a text; `path` is for the error.
[[nodiscard]] Result<std::vector<VmaInfo>> ParseVmas(std::string_view text,
                                                     const std::string& path);

struct ProcessInfo {
  Pid pid;
  Pid parent;
  char state = '?';  // R S D Z T t X
  bool kernel_thread = false;
  Pid tracer;                // 0: not traced
  std::vector<int> ns_pids;  // NSpid: outermost (ours) first, innermost last
  uint32_t uid = 0;          // effective
  std::string name;          // comm
  Vaddr start_brk;           // where its heap begins
  uint64_t start_time = 0;   // clock ticks since boot: tells a reused pid

  // A zombie, or about to vanish.
  [[nodiscard]] bool ended() const { return state == 'Z' || state == 'X'; }
  // Of a program: ended, or just ending and without memory (which no kernel thread has either).
  [[nodiscard]] bool ending() const { return ended() || kernel_thread; }
};

[[nodiscard]] Result<ProcessInfo> ReadProcess(Pid pid);

// Bit n-1 stands for signal n.
constexpr uint64_t SignalBit(int signal) {
  return uint64_t{1} << (signal - 1);
}
struct SignalSets {
  char state = '?';      // R S D Z T t X
  uint64_t pending = 0;  // of the thread alone
  uint64_t blocked = 0;
  uint64_t ignored = 0;
  uint64_t caught = 0;
};
// `pid` may be a thread.
[[nodiscard]] Result<SignalSets> ReadSignalSets(Pid pid);

// The system call a thread sleeps in; nothing when it runs.
struct BlockedCall {
  Pid thread;
  uint64_t number = 0;
  uint64_t args[6] = {};
  // In that call it waits for its userfaultfd event to be read (as /proc/PID/task/TID/wchan says;
  // false where the kernel doesn't tell).
  bool waits_for_event = false;
};
struct ThreadCalls {
  std::vector<BlockedCall> blocked;
  size_t threads = 0;   // blocked or not
  size_t stopped = 0;   // of these, by a tracer
  size_t runnable = 0;  // of these, on a CPU or waiting for one
  [[nodiscard]] size_t waiting_for_event() const;
};
[[nodiscard]] Result<ThreadCalls> ReadThreadCalls(Pid pid);
// Whether every thread is stopped (by a signal or a tracer) or has ended.
[[nodiscard]] Result<bool> IsStopped(Pid pid);
// Whether the process's main thread sleeps in that system call.
[[nodiscard]] bool SleepsInCall(Pid pid, uint64_t number);

// All of them, but where they are born or end too fast for many looks. The kernel's list of them
// ends early when a thread ends just as it is listed, or was about to be (next_tid in
// fs/proc/base.c): so they are counted too.
[[nodiscard]] Result<std::vector<Pid>> ReadThreads(Pid pid);
[[nodiscard]] Result<size_t> CountThreads(Pid pid);
// Children of every thread of `pid`, in our PID namespace.
[[nodiscard]] Result<std::vector<Pid>> ReadChildren(Pid pid);
// Those that this thread of it has made; none when it is gone.
[[nodiscard]] std::vector<Pid> ReadChildrenOf(Pid pid, Pid thread);
// False once the thread is seen outside of fork and clone; true while it runs, wherever that is.
[[nodiscard]] bool MayBeForking(Pid pid, Pid thread);
// How long the thread has had a CPU so far; nothing when it neither runs nor waits for one.
[[nodiscard]] std::optional<Nanos> RunTimeIfRunnable(Pid pid, Pid thread);
// `root` and all its descendants, parents before children.
[[nodiscard]] Result<std::vector<Pid>> ReadTree(Pid root);
// All processes, zombies too, in no order; those of a /proc that cannot be read are none.
[[nodiscard]] std::vector<Pid> ListProcesses();

}  // namespace unmoor
