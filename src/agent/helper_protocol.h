// Freestanding. What the worker (a process of ours) and the helper (our code inside the program's
// address space) say to each other: lists of small operations over a SOCK_SEQPACKET socket pair.
//
// One message is a MessageHeader and its operations; the helper runs them in order, stops at the
// first that fails (a Thaw in the list is always run) and answers with one Reply. A message may
// carry descriptors (SCM_RIGHTS), whose numbers in the helper's table come back in the Reply.
// A list with Freeze … Thaw is complete in itself: the helper finishes it even if the worker is
// killed meanwhile, and if the helper is killed the kernel releases the threads at once. So no
// thread of the program ever runs between a recheck and its swap.
//
// A window may be guarded (kGuard): between recheck and swap its pieces are read-only, and threads
// that were stopped in user mode run on until they write to one or make a system call. The helper
// is their tracer and holds them there. Should it be killed then, the *watch* gives the pieces
// their protection back before the kernel releases anybody: a thread of ours among the program's,
// the only kind of executor that no kill -9 of ours ends. It traces the helper with
// PTRACE_O_TRACEEXIT, so a killed helper stops with everything it traces still held until the watch
// lets it die.
//
//   watch:  kIdle → (kRequestArm) → kArmed → (helper's int3, kRequestRelease) → kIdle
//                                       ↘ (helper killed) → kHealing → it ends
//
// Both sides are built from the same tree; kProtocolVersion only guards against a helper left
// behind by another version.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unmoor::helper {

inline constexpr char kMagic[16] = "UNMOOR-HELPER";  // at the start of the code pages
inline constexpr uint32_t kProtocolVersion = 4;

enum class OpKind : uint32_t {
  kSyscall,  // args: number, a0 … a5. Result >= 0 or it fails.
  kIoctl,    // args: fd, request, five words of argument. EAGAIN with progress is continued.
  kMove,     // args: staging uffd, dst, src, length. UFFDIO_MOVE, else UFFDIO_COPY.
  kCopy,     // args: dst, src, length. A fault makes it fail with EFAULT.
  kPread,    // args: fd, dst, length, file offset. Short reads fail with ENODATA.
  kFreeze,   // args: task directory fd, time limit in ns, nested, uffd, guarded. Fails with EBUSY
             // when a thread does not stop in time or an event of the uffd is waiting to be read.
  // nested: the names in the directory are of an outer PID namespace. guarded: threads in
  // user mode run on as soon as their system calls are held.
  kCheckVma,  // args: maps fd, begin, end, prot, inode, offset, major << 32 | minor. One VMA.
  kRecheck,   // args: pagemap fd, begin, end, mirror - original, page limit, all. Copies what was
              // written since the baseline (all: every page of the program's own, since the page
              // tables may not tell); E2BIG beyond the limit.
  kHold,  // args: task directory fd, time limit in ns, nested. As kFreeze, but stays in force after
          // the list until a Thaw; its result is the number of threads not stopped yet, each asked
          // to. Fails with EBUSY when not all of them are known.
  kThaw,  // no args.
  kDeadline,    // args: ns. The helper ends by itself if it has not answered by then: it may be
                // waiting for a worker that is dead or stopped, with the program's threads stopped.
  kGuardPiece,  // args: begin, length, prot. Before kFreeze: what kGuard is to protect.
  kGuard,       // args: task directory fd, time limit in ns. Makes the pieces read-only; where that
                // would not be safe all threads are stopped instead, as without.
};

inline constexpr uint32_t kOpMayFail = 1;  // its failure does not stop the list

struct Op {
  OpKind kind;
  uint32_t flags;
  uint64_t args[7];
};
static_assert(sizeof(Op) == 64);

struct MessageHeader {
  uint32_t count;
  uint32_t reserved;
};

inline constexpr size_t kMaxPassed = 4;
inline constexpr size_t kReported = 4;

struct Reply {
  uint32_t done;    // operations that ran well, before the failing one if any
  int32_t error;    // errno of the first failure, 0
  uint32_t copied;  // pages copied by kRecheck
  uint32_t reserved;
  int32_t received_fds[kMaxPassed];  // -1: none
  int64_t results[kReported];        // of the first operations, as far as they are system calls
  int64_t result;                    // of the last system call
  int64_t pause_ns;    // first thread asked to stop … last thread released; 0: no freeze
  int64_t stop_ns;     // of that, until the last thread had stopped
  int64_t recheck_ns;  // and until the recheck was done
  uint32_t threads;    // stopped in that window
  uint32_t guarded;    // of these, ran on until they touched the window or made a system call
};

inline constexpr size_t kMaxOps = 1500;
inline constexpr size_t kMaxThreads = 32768;
inline constexpr size_t kMaxOwned = 512;
inline constexpr size_t kScanRegions = 1024;
inline constexpr size_t kMaxGuards = 64;

struct OwnedRange {
  uint64_t begin;
  uint64_t length;
};

struct GuardedPiece {
  uint64_t begin;
  uint64_t length;
  uint64_t prot;  // what it has unguarded
};

enum WatchRequest : uint32_t {
  kRequestNone = 0,
  kRequestArm = 1,
  kRequestRelease = 2,
  kRequestLeave = 3
};
enum WatchState : uint32_t {
  kWatchIdle = 0,
  kWatchArmed = 1,
  kWatchRefused = 2,
  kWatchHealing = 3
};

// The helper's writable memory, at a fixed distance behind its code. The worker reads `state`,
// `owned` and `helper_tid` from outside; `owned` is written by the worker before it has the range
// mapped, so that whoever comes after a crash knows what to unmap.
struct Data {
  char magic[16];
  uint32_t version;
  uint32_t state;  // 0 starting, 1 serving, 2 ended
  int32_t helper_tid;
  int32_t socket;         // the helper's end
  int32_t worker_socket;  // the end the worker takes with pidfd_getfd
  int32_t start_error;
  uint64_t owned_count;
  OwnedRange owned[kMaxOwned];
  MessageHeader header;
  Op ops[kMaxOps];
  struct {
    int32_t tid;
    int32_t signal;   // to deliver on release; -1: not stopped yet
    int32_t resumed;  // runs on, its system calls and signals held
  } threads[kMaxThreads];
  uint32_t thread_count;
  uint32_t held;         // between kHold and kThaw
  int32_t timer;         // of kDeadline
  uint32_t timer_state;  // 0 not made yet, 1 off, 2 running
  struct {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
  } regions[kScanRegions];
  char directory_entries[16384];

  GuardedPiece guards[kMaxGuards];
  uint32_t guard_count;
  uint32_t guard_active;      // some piece may be read-only, or a thread may still trip over that
  int32_t watch_thread;       // its id as the program sees it; the kernel clears it at its end
  uint32_t watch_request;     // WatchRequest, a futex
  uint32_t watch_state;       // WatchState, a futex
  int32_t helper_alive;       // the kernel clears it at the helper's end
  uint64_t segv_action[4];    // the program's own, while the watch stands in for it
  uint64_t ran[kMaxThreads];  // how long each thread had run when the helper ended
  char watch_name[16];        // as the task directory lists it
};

inline constexpr size_t kCodeSize = 16384;
inline constexpr size_t kDataSize = (sizeof(Data) + 4095) / 4096 * 4096;
inline constexpr size_t kWatchStackSize = 16384;
inline constexpr size_t kStackSize = 65536;
inline constexpr size_t kRegionSize = kCodeSize + kDataSize + kWatchStackSize + kStackSize;

}  // namespace unmoor::helper
