// Freestanding. The helper: our code inside the program's address space.
//
// A child process of the program made with CLONE_VM and no exit signal: it shares the memory, and
// nothing else (own descriptors, own signals, own thread group). It serves operation lists from the
// worker (helper_protocol.h) until the socket closes, then unmaps what it owns and exits. It is the
// one that stops the program's threads (ptrace) and the one that swaps, so killing any process at
// any moment can never let a thread write between a recheck and its swap.
//
// No libc, no allocation, no globals, position-independent: linked as a flat binary
// (helper_blob.ld) and written into the program by the injector. Only this one thread touches Data
// but for the fields helper_protocol.h names. On any internal failure it exits; the worker notices.
//
// The watch (below, and helper_protocol.h) is the one other piece of code: a thread of the program
// that sleeps unless a window is guarded, and undoes the guard if the helper is killed then.
#include <asm/unistd.h>
#include <linux/close_range.h>
#include <linux/fs.h>
#include <linux/prctl.h>
#include <linux/ptrace.h>
#include <linux/userfaultfd.h>
#include <sys/stat.h>

#include "agent/helper_protocol.h"
#include "os/kernel_abi.h"

namespace unmoor::helper {

using namespace kernel;  // NOLINT: its structures only
namespace {

constexpr long kEfault = 14, kEbusy = 16, kEnodata = 61, kE2big = 7, kEagain = 11, kEsrch = 3,
               kEintr = 4, kEstale = 116, kEnospc = 28, kEperm = 1, kEacces = 13, kEproto = 71,
               kEoverflow = 75, kEnoent = 2, kEtimedout = 110;
constexpr int kSigtrap = 5, kSigsegv = 11;

inline long Syscall(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0,
                    long f = 0) {
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = f;
  long result;
  // SAFETY: the kernel's calling convention; clobbers named.
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  return result;
}

template <class T>
long Address(T* pointer) {
  return reinterpret_cast<long>(pointer);  // SAFETY: only handed to system calls
}

inline long Word(uint64_t v) {
  return static_cast<long>(v);
}

// rep movsb with a way out: the fault handler moves the instruction pointer from the copy to the
// exit, leaving the number of bytes not copied. Returns 0 or that number.
extern "C" unsigned long unmoor_copy(void* dst, const void* src, unsigned long length);
extern "C" char unmoor_copy_begin[], unmoor_copy_fault[];
asm(R"(
.text
.global unmoor_copy, unmoor_copy_begin, unmoor_copy_fault
.hidden unmoor_copy, unmoor_copy_begin, unmoor_copy_fault
unmoor_copy:
  mov %rdx, %rcx
unmoor_copy_begin:
  rep movsb
unmoor_copy_fault:
  mov %rcx, %rax
  ret
.hidden unmoor_restorer
.global unmoor_restorer
unmoor_restorer:
  mov $15, %eax
  syscall
)");
extern "C" char unmoor_restorer[];

void FaultHandler(int /*signal*/, void* /*info*/, KernelUcontext* context) {
  auto& rip = context->mcontext.rip;
  if (rip == static_cast<uint64_t>(Address(unmoor_copy_begin))) {
    rip = static_cast<uint64_t>(Address(unmoor_copy_fault));
    return;
  }
  Syscall(__NR_exit_group, 1);
}

int64_t Now() {
  int64_t time[2] = {};
  Syscall(__NR_clock_gettime, 1 /*CLOCK_MONOTONIC*/, Address(time));
  return time[0] * 1'000'000'000 + time[1];
}

struct PollFd {
  int fd;
  short events;
  short revents;
};

bool Readable(int fd, int64_t timeout_ns) {
  PollFd poll = {fd, 1 /*POLLIN*/, 0};
  constexpr int64_t kSecond = 1'000'000'000;
  const int64_t timeout[2] = {timeout_ns / kSecond, timeout_ns % kSecond};
  return Syscall(__NR_ppoll, Address(&poll), 1, Address(timeout), 0, 8) > 0;
}

// --- freezing -----------------------------------------------------------------------------------

struct DirectoryEntry {  // linux_dirent64
  uint64_t inode;
  int64_t offset;
  uint16_t length;
  uint8_t type;
  char name[1];
};

// Waits a little, longer after many idle turns, so that whoever is waited for finds a core.
void Idle(int turn) {
  if (turn < 64) {
    Syscall(__NR_sched_yield);
    return;
  }
  const int64_t nap[2] = {0, 20'000};
  Syscall(__NR_nanosleep, Address(nap), 0);
}

// Whether it is among the first `count` of the table. Looks at `next` first, where the one after
// that found last is: the table has the order of the list, but for gaps.
bool Known(const Data& data, uint32_t count, int tid, uint32_t& next) {
  for (uint32_t n = 0; n < count; ++n, ++next) {
    if (next >= count) next = 0;
    if (data.threads[next].tid == tid) return true;
  }
  return false;
}

// Reads task/<name>/<file> of the directory into `text`. The number of bytes, or -errno.
long ReadThreadFile(long task_fd, const char* name, const char* file, char* text, long size) {
  char path[40];
  int length = 0;
  while (name[length] != 0 && length < 16) {
    path[length] = name[length];
    ++length;
  }
  for (const char* p = file; *p != 0; ++p) path[length++] = *p;
  path[length] = 0;
  const long fd = Syscall(__NR_openat, task_fd, Address(path), 0, 0);
  if (fd < 0) return fd;
  const long read = Syscall(__NR_read, fd, Address(text), size);
  Syscall(__NR_close, fd);
  return read;
}

// The id that the thread listed as `name` has in our own PID namespace: the last number of the
// NSpid line of its status. 0 when it is gone; -errno when that cannot be told, which must never
// pass for a thread that need not be stopped.
long OwnIdOf(long task_fd, const char* name) {
  char text[16384];
  const long size = ReadThreadFile(task_fd, name, "/status", text, sizeof(text));
  if (size == -kEsrch || size == -kEnoent) return 0;
  if (size < 0) return size;
  for (long i = 0; i + 6 < size; ++i) {
    if (text[i] != '\n' || text[i + 1] != 'N' || text[i + 2] != 'S' || text[i + 3] != 'p') continue;
    long id = 0;
    bool in_number = false;
    for (i += 7; i < size && text[i] != '\n'; ++i) {
      const bool digit = text[i] >= '0' && text[i] <= '9';
      if (digit) id = (in_number ? id * 10 : 0) + (text[i] - '0');
      in_number = digit;
    }
    return id;
  }
  return -kEproto;
}

// The state of the thread listed as `name` (zombie leaders stay listed); 'X': it is gone.
char StateOf(long task_fd, const char* name) {
  char text[512];
  const long size = ReadThreadFile(task_fd, name, "/stat", text, sizeof(text));
  long paren = 0;
  for (long i = 0; i < size; ++i) {
    if (text[i] == ')') paren = i;
  }
  return paren + 2 < size ? text[paren + 2] : 'X';
}

// The number of threads of the process, with those that have ended and are still listed.
long ThreadCount(long task_fd) {
  struct stat status{};
  const long error = Syscall(__NR_fstat, task_fd, Address(&status));
  return error < 0 ? error : static_cast<long>(status.st_nlink) - 2;
}

struct Listing {
  long found = 0;        // seized now
  bool watch = false;    // ours is among them
  char zombie[16] = {};  // one that has ended, and stays listed
};

// Seizes and interrupts every thread not yet in the table. 0 or -errno.
long SeizeNewThreads(Data& data, long task_fd, bool nested, Listing& listing) {
  const uint32_t known = data.thread_count;
  uint32_t next = 0;
  if (Syscall(__NR_lseek, task_fd, 0, 0) < 0) return -kEsrch;
  for (;;) {
    const long bytes = Syscall(__NR_getdents64, task_fd, Address(data.directory_entries),
                               sizeof(data.directory_entries));
    if (bytes < 0) return bytes;
    if (bytes == 0) return 0;
    for (long at = 0; at < bytes;) {
      // SAFETY: the kernel fills the buffer with such records.
      const auto* entry = reinterpret_cast<const DirectoryEntry*>(data.directory_entries + at);
      at += entry->length;
      long listed = 0;
      for (const char* p = entry->name; *p >= '0' && *p <= '9'; ++p) {
        listed = listed * 10 + (*p - '0');
      }
      if (listed != 0 && nested) listed = OwnIdOf(task_fd, entry->name);
      if (listed < 0) return listed;
      const int tid = static_cast<int>(listed);
      if (tid == 0 || Known(data, known, tid, next)) continue;
      if (tid == __atomic_load_n(&data.watch_thread, __ATOMIC_RELAXED)) {
        int i = 0;  // ours; it stays free to act
        for (; entry->name[i] != 0 && i < 15; ++i) data.watch_name[i] = entry->name[i];
        data.watch_name[i] = 0;
        listing.watch = true;
        continue;
      }
      if (data.thread_count == kMaxThreads) return -kEoverflow;
      // SAFETY: ptrace of a thread of the program we serve; released by Thaw or by our death.
      const long error = Syscall(__NR_ptrace, PTRACE_SEIZE, tid, 0, PTRACE_O_TRACESYSGOOD);
      if (error == -kEsrch) continue;  // it is ending
      if (error == -kEperm) {
        const char state = StateOf(task_fd, entry->name);
        if (state != 'Z' && state != 'X') return -kEacces;
        for (int i = 0; entry->name[i] != 0 && i < 15; ++i) listing.zombie[i] = entry->name[i];
        continue;
      }
      if (error < 0) return error;
      data.threads[data.thread_count++] = {tid, -1, 0};
      Syscall(__NR_ptrace, PTRACE_INTERRUPT, tid, 0, 0);
      ++listing.found;
    }
  }
}

// Whether there is no thread but those in the table, which each stay until we have waited for them,
// and those that need not be. A list alone does not tell: a thread that ends just as it is listed,
// or was about to be, ends the list as well (next_tid in the kernel's fs/proc/base.c), whatever
// comes after it.
bool IsComplete(const Data& data, long task_fd, const Listing& listing) {
  const long count = ThreadCount(task_fd);
  const bool zombie = listing.zombie[0] != 0 && StateOf(task_fd, listing.zombie) == 'Z';
  return count == data.thread_count + (listing.watch ? 1 : 0) + (zombie ? 1 : 0);
}

// The status of thread `i` if it has stopped since the last look, else 0. One that is gone is taken
// off the table; the caller looks at slot i again.
int StopOf(Data& data, uint32_t i) {
  int status = 0;
  constexpr long kWnohang = 1, kWall = 0x40000000;
  const long waited =
      Syscall(__NR_wait4, data.threads[i].tid, Address(&status), kWnohang | kWall, 0);
  if (waited == 0 || waited == -kEintr) return 0;
  if (waited > 0 && (status & 0xff) == 0x7f) return status;
  data.threads[i] = data.threads[--data.thread_count];
  return 0;
}

// One look at thread `i`. True when it is stopped; `status` says how, if that was not known yet.
bool Collect(Data& data, uint32_t i, int& status) {
  status = 0;
  if (data.threads[i].signal >= 0) return true;
  status = StopOf(data, i);
  if (status == 0) return false;
  const int event = status >> 16;
  data.threads[i].signal = event != 0 ? 0 : (status >> 8) & 0xff;
  return true;
}

bool IsGuarded(const Data& data, uint64_t address) {
  for (uint32_t i = 0; i < data.guard_count; ++i) {
    if (address - data.guards[i].begin < data.guards[i].length) return true;
  }
  return false;
}

// Whether a thread just stopped may run on below a guard: it was in user mode, nothing of it that
// the kernel writes to by itself is guarded, and the signal of a fault would come to us first
// without the kernel changing the program's disposition (a blocked one's).
bool MayRunOn(const Data& data, int tid, int status) {
  constexpr int kInterrupted = kSigtrap | 128 /*PTRACE_EVENT_STOP*/ << 8;
  constexpr long kGetSigmask = 0x420a, kGetRseq = 0x420f;
  if (status >> 8 != kInterrupted) return false;
  uint64_t registers[27];
  if (Syscall(__NR_ptrace, PTRACE_GETREGS, tid, 0, Address(registers)) < 0) return false;
  constexpr int kOrigRax = 15, kCs = 17, kRsp = 19, kFsBase = 21;
  if (registers[kOrigRax] != ~uint64_t{0} || registers[kCs] != 0x33) return false;
  if (IsGuarded(data, registers[kRsp]) || IsGuarded(data, registers[kFsBase])) return false;
  uint64_t mask = ~uint64_t{0};
  if (Syscall(__NR_ptrace, kGetSigmask, tid, sizeof(mask), Address(&mask)) < 0) return false;
  if ((mask & uint64_t{1} << (kSigsegv - 1)) != 0) return false;
  struct {
    uint64_t pointer;
    uint32_t size, signature, flags, padding;
  } rseq{};
  const long known = Syscall(__NR_ptrace, kGetRseq, tid, sizeof(rseq), Address(&rseq));
  return known > 0 && !IsGuarded(data, rseq.pointer) && !IsGuarded(data, rseq.pointer + 31);
}

void RunOn(Data& data, uint32_t i) {
  auto& thread = data.threads[i];
  thread.signal = -1;
  thread.resumed = 1;
  Syscall(__NR_ptrace, PTRACE_SYSCALL, thread.tid, 0, 0);
}

// Returns how many threads have not stopped within the limit, each asked to; or -errno (EBUSY: not
// all of them are known). `guarded`: threads in user mode run on at once, but no further than their
// next system call, signal or fault.
long StopThreads(Data& data, long task_fd, int64_t limit_ns, bool nested, bool guarded) {
  const int64_t began = Now();
  for (int idle = 0;; Idle(++idle)) {
    Listing listing;
    if (const long error = SeizeNewThreads(data, task_fd, nested, listing); error < 0) return error;
    long late = 0;
    for (uint32_t i = 0; i < data.thread_count;) {
      const uint32_t before = data.thread_count;
      int status = 0;
      if (data.threads[i].resumed != 0 && guarded) {
        ++i;
      } else if (Collect(data, i, status)) {
        if (guarded && MayRunOn(data, data.threads[i].tid, status)) RunOn(data, i);
        ++i;
      } else if (data.thread_count == before) {
        ++late;
        ++i;
      }
    }
    const bool over = listing.found == 0 && Now() - began > limit_ns;
    if (late > 0 && !over) continue;
    const bool complete = IsComplete(data, task_fd, listing);
    if (complete && late == 0) return data.thread_count > 0 ? 0 : -kEsrch;
    if (over) return complete ? late : -kEbusy;
  }
}

// While threads are stopped nobody may keep us from a core: SCHED_FIFO for the length of the
// window. Where the program may not (CAP_SYS_NICE) this does nothing.
void Hurry(bool on) {
  const int priority = on ? 1 : 0;
  Syscall(__NR_sched_setscheduler, 0, on ? 1 /*SCHED_FIFO*/ : 0 /*SCHED_OTHER*/,
          Address(&priority));
}

long Freeze(Data& data, const uint64_t (&a)[7], int64_t& began) {
  const int uffd = static_cast<int>(a[3]);
  const bool guarded = a[4] != 0 && data.held == 0 && data.thread_count == 0;
  Hurry(true);
  began = Now();
  const long late = StopThreads(data, Word(a[0]), static_cast<int64_t>(a[1]), a[2] != 0, guarded);
  if (late < 0) return late;
  return late > 0 || (uffd >= 0 && Readable(uffd, 0)) ? -kEbusy : 0;
}

// --- guarding -----------------------------------------------------------------------------------

constexpr long kFutexWait = 0, kFutexWake = 1;

void FutexWait(uint32_t* word, uint32_t value, int64_t limit_ns) {
  const int64_t limit[2] = {limit_ns / 1'000'000'000, limit_ns % 1'000'000'000};
  Syscall(__NR_futex, Address(word), kFutexWait, value, Address(limit));
}

void FutexSet(uint32_t* word, uint32_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
  Syscall(__NR_futex, Address(word), kFutexWake, 64);
}

uint32_t Load(const uint32_t& word) {
  return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}

// Where the line of a status file that begins with `name` has its value; null: nowhere.
const char* LineOf(const char* text, const char* name) {
  for (; *text != 0; ++text) {
    if (*text != '\n') continue;
    const char* at = text + 1;
    const char* wanted = name;
    while (*wanted != 0 && *at == *wanted) ++at, ++wanted;
    if (*wanted == 0) return at;
  }
  return nullptr;
}

// Whether the watch can do its work: not stopped by job control, and no seccomp filter that might
// end the program for it; and the program does not ignore SIGSEGV, which a fault would change.
bool WatchIsFit(const Data& data, long task_fd) {
  if (__atomic_load_n(&data.watch_thread, __ATOMIC_ACQUIRE) == 0) return false;
  char text[8192];
  const long size = ReadThreadFile(task_fd, data.watch_name, "/status", text, sizeof(text) - 1);
  if (size <= 0) return false;
  text[size] = 0;
  const char* state = LineOf(text, "State:\t");
  const char* seccomp = LineOf(text, "Seccomp:\t");
  const char* ignored = LineOf(text, "SigIgn:\t");
  if (state == nullptr || seccomp == nullptr || ignored == nullptr) return false;
  const char digit = ignored[13];  // signals 9 to 12
  const int bits = digit >= 'a' ? digit - 'a' + 10 : digit - '0';
  return *state != 'T' && *state != 't' && *seccomp == '0' && (bits & 4) == 0;
}

// Has the watch trace us. False when it does not answer in time, or may not.
bool Arm(Data& data) {
  constexpr int64_t kPatience = 3'000'000;
  const int64_t began = Now();
  FutexSet(&data.watch_request, kRequestArm);
  for (;;) {
    const uint32_t state = Load(data.watch_state);
    if (state == kWatchArmed) return true;
    if (state != kWatchIdle || Now() - began > kPatience) break;
    FutexWait(&data.watch_state, state, 500'000);
  }
  FutexSet(&data.watch_request, kRequestNone);
  return false;
}

// The breakpoint stops us; the watch lets go of us there.
void Disarm(Data& data) {
  if (Load(data.watch_state) != kWatchArmed) return;
  FutexSet(&data.watch_request, kRequestRelease);
  asm volatile("int3" ::: "memory");
}

void Unguard(Data& data) {
  for (uint32_t i = 0; i < data.guard_count; ++i) {
    const GuardedPiece& piece = data.guards[i];
    Syscall(__NR_mprotect, Word(piece.begin), Word(piece.length), Word(piece.prot));
  }
}

bool IsGuardFault(const Data& data, const uint64_t (&info)[16]) {
  constexpr uint64_t kAccerr = 2;  // SEGV_ACCERR; the code is the third int of a siginfo_t
  return (info[0] & 0xffffffff) == kSigsegv && (info[1] & 0xffffffff) == kAccerr &&
         IsGuarded(data, info[2]);
}

bool StoppedByGuard(const Data& data, int tid) {
  uint64_t info[16] = {};
  return Syscall(__NR_ptrace, PTRACE_GETSIGINFO, tid, 0, Address(info)) >= 0 &&
         IsGuardFault(data, info);
}

// A thread may be stopped between its fault and that fault's signal.
bool GuardFaultPends(const Data& data, int tid) {
  struct {
    uint64_t offset;
    uint32_t flags;
    int32_t count;
  } which = {0, 0, 8};
  uint64_t infos[8][16] = {};
  const long found = Syscall(__NR_ptrace, PTRACE_PEEKSIGINFO, tid, Address(&which), Address(infos));
  for (long i = 0; i < found; ++i) {
    if (IsGuardFault(data, infos[i])) return true;
  }
  return false;
}

// One look at a thread that ran on, with the pieces writable again. True when it is stopped such
// that releasing it, even by our death, lets it go on as if there had been no guard.
bool Settle(Data& data, uint32_t i) {
  const int tid = data.threads[i].tid;
  const int status = StopOf(data, i);
  if (status == 0) return false;
  constexpr int kSystemCallStop = kSigtrap | 0x80;
  const int signal = status >> 8 & 0xff;
  const bool event = status >> 16 != 0;
  if (!event && signal == kSigsegv && StoppedByGuard(data, tid)) {
    // The signal is dropped, and the thread stops once more before any instruction.
    Syscall(__NR_ptrace, PTRACE_INTERRUPT, tid, 0, 0);
    RunOn(data, i);
    return false;
  }
  if (event && GuardFaultPends(data, tid)) {
    RunOn(data, i);  // as far as that signal
    return false;
  }
  data.threads[i].signal = event || signal == kSystemCallStop ? 0 : signal;
  data.threads[i].resumed = 0;
  return true;
}

// Stops the threads that ran on, with the pieces writable. Returns how many are late.
long StopResumed(Data& data, int64_t limit_ns) {
  const int64_t began = Now();
  for (uint32_t i = 0; i < data.thread_count; ++i) {
    if (data.threads[i].resumed == 0) continue;
    Syscall(__NR_ptrace, PTRACE_INTERRUPT, data.threads[i].tid, 0, 0);
  }
  for (int turn = 1;; ++turn) {
    long late = 0;
    for (uint32_t i = 0; i < data.thread_count;) {
      const uint32_t before = data.thread_count;
      if (data.threads[i].resumed == 0 || Settle(data, i)) {
        ++i;
      } else if (data.thread_count == before) {
        ++late;
        ++i;
      }
    }
    if (late == 0 || Now() - began > limit_ns) return late;
    Idle(turn);
  }
}

bool AnyResumed(const Data& data) {
  for (uint32_t i = 0; i < data.thread_count; ++i) {
    if (data.threads[i].resumed != 0) return true;
  }
  return false;
}

long Guard(Data& data, const uint64_t (&a)[7], uint32_t& ran_on) {
  ran_on = 0;
  for (uint32_t i = 0; i < data.thread_count; ++i) ran_on += data.threads[i].resumed;
  if (ran_on == 0) return 0;
  if (data.guard_count > 0 && WatchIsFit(data, Word(a[0])) && Arm(data)) {
    data.guard_active = 1;
    bool guarded = true;
    for (uint32_t i = 0; i < data.guard_count && guarded; ++i) {
      constexpr uint64_t kProtWrite = 2;
      const GuardedPiece& piece = data.guards[i];
      guarded = Syscall(__NR_mprotect, Word(piece.begin), Word(piece.length),
                        Word(piece.prot & ~kProtWrite)) >= 0;
    }
    if (guarded) return 0;
    Unguard(data);
  }
  ran_on = 0;
  return StopResumed(data, static_cast<int64_t>(a[1])) > 0 ? -kEbusy : 0;
}

// Before anybody is released: the pieces as they were, nobody on the way into the guard, and us no
// longer traced, since a wait() of the program would see that. False while some thread is late.
bool EndGuard(Data& data, int64_t limit_ns) {
  if (data.guard_active != 0) Unguard(data);
  const bool settled = StopResumed(data, limit_ns) == 0;
  if (settled) {
    Disarm(data);
    data.guard_active = 0;
    data.guard_count = 0;
  }
  return settled;
}

// --- releasing ----------------------------------------------------------------------------------

// Releases every stopped thread. One that has not stopped yet (it sleeps where ptrace cannot reach
// it, waiting for an event to be read, say) stays in the table and is released when it stops.
void Thaw(Data& data) {
  constexpr int64_t kSettleLimit = 2'000'000;
  EndGuard(data, kSettleLimit);
  uint32_t late = 0;
  while (late < data.thread_count) {
    const uint32_t before = data.thread_count;
    int status = 0;
    if (data.threads[late].resumed != 0) {
      ++late;
    } else if (Collect(data, late, status)) {
      const auto thread = data.threads[late];
      Syscall(__NR_ptrace, PTRACE_DETACH, thread.tid, 0, thread.signal);
      data.threads[late] = data.threads[--data.thread_count];
    } else if (data.thread_count == before) {
      ++late;
    }
  }
}

// --- operations ---------------------------------------------------------------------------------

// Our own end if this is not called off in time (0).
long SetDeadline(Data& data, uint64_t nanoseconds) {
  if (data.timer_state == 0) {
    const struct {
      uint64_t value;
      int32_t signal;
      int32_t notify;
      int32_t padding[12];
    } event = {0, 9 /*SIGKILL*/, 0 /*SIGEV_SIGNAL*/, {}};
    const long error =
        Syscall(__NR_timer_create, 1 /*CLOCK_MONOTONIC*/, Address(&event), Address(&data.timer));
    if (error < 0) return error;
  }
  const uint64_t time[4] = {0, 0, nanoseconds / 1'000'000'000, nanoseconds % 1'000'000'000};
  data.timer_state = nanoseconds == 0 ? 1 : 2;
  return Syscall(__NR_timer_settime, data.timer, 0, Address(time), 0);
}

long Copy(uint64_t dst, uint64_t src, uint64_t length) {
  // SAFETY: addresses planned by the worker; a fault is turned into EFAULT.
  return unmoor_copy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), length) == 0
             ? 0
             : -kEfault;
}

// An ioctl whose argument's fifth word is the number of bytes done (UFFDIO_COPY, UFFDIO_MOVE).
long TransferIoctl(long fd, unsigned long request, uint64_t dst, uint64_t src, uint64_t length) {
  int idle = 0;
  while (length > 0) {
    uint64_t argument[5] = {dst, src, length, 0, 0};
    const long error = Syscall(__NR_ioctl, fd, Word(request), Address(argument));
    const auto done = static_cast<int64_t>(argument[4]);
    if (error < 0 && error != -kEagain) return error;
    if (done <= 0 && ++idle > 1000) return -kEagain;
    if (done > 0) {
      dst += static_cast<uint64_t>(done);
      src += static_cast<uint64_t>(done);
      length -= static_cast<uint64_t>(done);
    }
  }
  return 0;
}

long Move(const uint64_t (&a)[7]) {
  const long error = TransferIoctl(Word(a[0]), UFFDIO_MOVE, a[1], a[2], a[3]);
  if (error == 0) return 0;
  return TransferIoctl(Word(a[0]), UFFDIO_COPY, a[1], a[2], a[3]);
}

long Pread(const uint64_t (&a)[7]) {
  for (uint64_t done = 0; done < a[2];) {
    const long n =
        Syscall(__NR_pread64, Word(a[0]), Word(a[1] + done), Word(a[2] - done), Word(a[3] + done));
    if (n == -kEintr) continue;
    if (n < 0) return n;
    if (n == 0) return -kEnodata;
    done += static_cast<uint64_t>(n);
  }
  return 0;
}

long CheckVma(const uint64_t (&a)[7]) {
  ProcmapQuery query{};
  query.size = sizeof(query);
  query.query_addr = a[1];
  const long error = Syscall(__NR_ioctl, Word(a[0]), Word(kProcmapQuery), Address(&query));
  if (error < 0) return error;
  const uint64_t device = uint64_t{query.dev_major} << 32 | query.dev_minor;
  const bool file_matches = query.inode == a[4] && device == a[6] &&
                            (a[4] == 0 || query.vma_offset + (a[1] - query.vma_start) == a[5]);
  // Flags: readable 1, writable 2, executable 4, as PROT_*; shared 8.
  const bool matches = query.vma_start <= a[1] && a[2] <= query.vma_end &&
                       (query.vma_flags & 15) == a[3] && file_matches;
  return matches ? 0 : -kEstale;
}

long Recheck(Data& data, const uint64_t (&a)[7], uint32_t& copied) {
  uint64_t limit = a[4] > copied ? a[4] - copied : 0;
  uint64_t at = a[1];
  while (at < a[2]) {
    PmScanArg scan{};
    scan.size = sizeof(scan);
    scan.flags = kPmScanCheckWpAsync;
    scan.start = at;
    scan.end = a[2];
    scan.vec = static_cast<uint64_t>(Address(data.regions));
    scan.vec_len = kScanRegions;
    scan.category_inverted = kPageIsFile | kPageIsPfnZero;
    scan.category_mask = (a[5] != 0 ? 0 : kPageIsWritten) | kPageIsFile | kPageIsPfnZero;
    scan.category_anyof_mask = kPageIsPresent | kPageIsSwapped;
    scan.return_mask = kPageIsPresent;
    const long regions = Syscall(__NR_ioctl, Word(a[0]), Word(kPagemapScan), Address(&scan));
    if (regions < 0) return regions;
    for (long i = 0; i < regions; ++i) {
      const auto& region = data.regions[i];
      const uint64_t pages = (region.end - region.start) >> 12;
      if (pages > limit) return -kE2big;
      limit -= pages;
      const long error = Copy(region.start + a[3], region.start, region.end - region.start);
      if (error < 0) return error;
      copied += static_cast<uint32_t>(pages);
    }
    if (scan.walk_end <= at) return -kEstale;
    at = scan.walk_end;
  }
  return 0;
}

long RunOp(Data& data, Op& op, Reply& reply, int64_t& began) {
  auto& a = op.args;
  switch (op.kind) {
    case OpKind::kSyscall:
      return reply.result = Syscall(Word(a[0]), Word(a[1]), Word(a[2]), Word(a[3]), Word(a[4]),
                                    Word(a[5]), Word(a[6]));
    case OpKind::kIoctl:
      return reply.result = Syscall(__NR_ioctl, Word(a[0]), Word(a[1]), Address(&a[2]));
    case OpKind::kMove:
      return Move(a);
    case OpKind::kCopy:
      return Copy(a[0], a[1], a[2]);
    case OpKind::kPread:
      return Pread(a);
    case OpKind::kFreeze: {
      const long result = Freeze(data, a, began);
      reply.stop_ns = Now() - began;
      return result;
    }
    case OpKind::kCheckVma:
      return CheckVma(a);
    case OpKind::kRecheck: {
      const long result = Recheck(data, a, reply.copied);
      reply.recheck_ns = began == 0 ? 0 : Now() - began;
      return result;
    }
    case OpKind::kHold:
      data.held = 1;
      return reply.result =
                 StopThreads(data, Word(a[0]), static_cast<int64_t>(a[1]), a[2] != 0, false);
    case OpKind::kDeadline:
      return SetDeadline(data, a[0]);
    case OpKind::kThaw:
      data.held = 0;
      reply.threads = data.thread_count;
      Thaw(data);
      reply.pause_ns = began == 0 ? 0 : Now() - began;
      Hurry(false);
      began = 0;
      return 0;
    case OpKind::kGuardPiece:
      if (data.guard_active != 0 || data.guard_count == kMaxGuards) return -kEbusy;
      data.guards[data.guard_count] = {a[0], a[1], a[2]};
      ++data.guard_count;
      return 0;
    case OpKind::kGuard:
      return Guard(data, a, reply.guarded);
  }
  return -kEnospc;
}

void RunList(Data& data, uint32_t count, Reply& reply) {
  int64_t began = 0;
  if (data.thread_count == 0 && data.guard_active == 0) data.guard_count = 0;
  for (uint32_t i = 0; i < count; ++i) {
    Op& op = data.ops[i];
    if (reply.error != 0 && op.kind != OpKind::kThaw) continue;
    if (op.kind == OpKind::kThaw && began == 0 && data.held == 0) continue;
    const long result = RunOp(data, op, reply, began);
    if (i < kReported) reply.results[i] = result;
    if (result < 0 && (op.flags & kOpMayFail) == 0) {
      if (reply.error == 0) reply.error = static_cast<int32_t>(-result);
    } else if (reply.error == 0) {
      reply.done = i + 1;
    }
  }
  if (data.timer_state == 2) SetDeadline(data, 0);
  if (began != 0) Thaw(data);  // a list without its Thaw is a bug; the program must not pay for it
}

// --- serving ------------------------------------------------------------------------------------

struct ControlBuffer {
  KernelCmsghdr header;
  int fds[kMaxPassed];
};

// False when the worker is gone.
bool Serve(Data& data) {
  while (data.held == 0 && data.thread_count > 0) {
    Thaw(data);  // those that were late
    if (data.thread_count == 0) break;
    if (AnyResumed(data)) {
      Idle(64);  // the next list could not tell them from others
    } else if (Readable(data.socket, 200'000)) {
      break;
    }
  }
  KernelIovec iov[2] = {{&data.header, sizeof(data.header)}, {data.ops, sizeof(data.ops)}};
  ControlBuffer control{};
  KernelMsghdr message{};
  message.iov = iov;
  message.iovlen = 2;
  message.control = &control;
  message.controllen = sizeof(control);
  const long n = Syscall(__NR_recvmsg, data.socket, Address(&message), 0);
  if (n == -kEintr) return true;
  if (n < static_cast<long>(sizeof(MessageHeader))) return false;
  Reply reply{};
  const bool passed = message.controllen > sizeof(KernelCmsghdr) && control.header.type == 1;
  for (size_t i = 0; i < kMaxPassed; ++i) {
    const size_t end = sizeof(KernelCmsghdr) + (i + 1) * sizeof(int);
    reply.received_fds[i] = passed && control.header.length >= end ? control.fds[i] : -1;
  }
  const auto present = static_cast<uint64_t>(n) - sizeof(MessageHeader);
  if (data.header.count > kMaxOps || data.header.count * sizeof(Op) != present) return false;
  RunList(data, data.header.count, reply);
  return Syscall(__NR_sendto, data.socket, Address(&reply), sizeof(reply), 0x4000 /*NOSIGNAL*/) ==
         sizeof(reply);
}

// Where the scheduler shares between sessions first (autogroup), ours would get as much as all of
// the program, and on a core that both use more, since the program's share is spread over all it
// uses: its thread there would wait two ticks of three.
void TakeLess() {
  const long fd = Syscall(__NR_openat, -100 /*AT_FDCWD*/, Address("/proc/self/autogroup"), 1, 0);
  if (fd < 0) return;
  Syscall(__NR_write, fd, Address("5"), 1);
  Syscall(__NR_close, fd);
}

void Isolate() {
  // Every signal but the two our copy turns into EFAULT.
  const uint64_t mask = ~(uint64_t{1} << (11 - 1) | uint64_t{1} << (7 - 1));
  Syscall(__NR_rt_sigprocmask, 2 /*SIG_SETMASK*/, Address(&mask), 0, sizeof(mask));
  KernelSigaction action{};
  action.handler = static_cast<uint64_t>(Address(&FaultHandler));
  action.flags = 0x04000000 /*SA_RESTORER*/ | 0x4 /*SA_SIGINFO*/ | 0x40000000 /*SA_NODEFER*/;
  action.restorer = static_cast<uint64_t>(Address(unmoor_restorer));
  Syscall(__NR_rt_sigaction, 11, Address(&action), 0, sizeof(action.mask));
  Syscall(__NR_rt_sigaction, 7, Address(&action), 0, sizeof(action.mask));
  Syscall(__NR_close_range, 0, 0xffffffffL, 0);
  Syscall(__NR_setsid);
  TakeLess();
  const uint64_t no_core[2] = {0, 0};
  Syscall(__NR_prlimit64, 0, 4 /*RLIMIT_CORE*/, Address(no_core), 0);
  Syscall(__NR_prctl, PR_SET_TIMERSLACK, 1);
  char name[16] = {'u', 'n', 'm', 'o', 'o', 'r', '-', 'h', 'e', 'l', 'p', 'e', 'r', 0};
  Syscall(__NR_prctl, PR_SET_NAME, Address(name));
}

extern "C" [[noreturn]] __attribute__((used)) void unmoor_helper_main(Data* data_pointer) {
  Data& data = *data_pointer;
  Isolate();
  data.helper_tid = static_cast<int32_t>(Syscall(__NR_getpid));
  data.helper_alive = 1;
  Syscall(__NR_set_tid_address, Address(&data.helper_alive));
  int sockets[2] = {-1, -1};
  data.start_error = static_cast<int32_t>(
      -Syscall(__NR_socketpair, 1 /*AF_UNIX*/, 5 /*SEQPACKET*/, 0, Address(sockets)));
  data.socket = sockets[0];
  data.worker_socket = sockets[1];
  __atomic_store_n(&data.state, 1, __ATOMIC_RELEASE);
  // Until the worker's first list closes its end here too, its death would not show.
  constexpr int64_t kAdoption = 2'000'000'000;
  if (data.start_error == 0 && Readable(data.socket, kAdoption)) {
    while (Serve(data)) {
    }
  }
  // The worker is gone: give back what only the remap needed.
  FutexSet(&data.watch_request, kRequestLeave);
  for (int turn = 1; __atomic_load_n(&data.watch_thread, __ATOMIC_ACQUIRE) != 0 && turn < 1000;
       ++turn) {
    Idle(turn);  // else whoever removes our traces ends it
  }
  for (uint64_t i = 0; i < data.owned_count && i < kMaxOwned; ++i) {
    if (data.owned[i].length != 0) {
      Syscall(__NR_munmap, Word(data.owned[i].begin), Word(data.owned[i].length));
    }
  }
  data.owned_count = 0;
  __atomic_store_n(&data.state, 2, __ATOMIC_RELEASE);
  for (;;) Syscall(__NR_exit_group, 0);
}

// --- the watch ----------------------------------------------------------------------------------

extern "C" char unmoor_blob[], unmoor_stand_in[];

constexpr uint64_t kResetHand = 0x80000000;

// The beginning of /proc/self/task/TID/NAME; 0 where it cannot be read.
long ReadOfTask(int tid, const char* name, char* text, size_t capacity) {
  char path[48] = "/proc/self/task/";
  int length = 16;
  int digits = 1;
  for (int rest = tid; rest >= 10; rest /= 10) ++digits;
  for (int i = digits - 1, rest = tid; i >= 0; --i, rest /= 10) {
    path[length + i] = static_cast<char>('0' + rest % 10);
  }
  length += digits;
  for (const char* p = name; *p != 0; ++p) path[length++] = *p;
  path[length] = 0;
  const long fd = Syscall(__NR_openat, -100 /*AT_FDCWD*/, Address(path), 0, 0);
  if (fd < 0) return 0;
  const long size = Syscall(__NR_read, fd, Address(text), Word(capacity));
  Syscall(__NR_close, fd);
  return size < 0 ? 0 : size;
}

// How long the thread has run, in ns; 0 where that cannot be told.
uint64_t RunTime(int tid) {
  char text[64];
  const long size = ReadOfTask(tid, "/schedstat", text, sizeof(text));
  uint64_t time = 0;
  for (long i = 0; i < size && text[i] >= '0' && text[i] <= '9'; ++i) {
    time = time * 10 + static_cast<uint64_t>(text[i] - '0');
  }
  return time;
}

// Asleep where a signal wakes it: not on its way to one.
bool Sleeps(int tid) {
  char text[128];
  const long size = ReadOfTask(tid, "/stat", text, sizeof(text));
  long name_end = size;  // the name may hold anything, but ends within these bytes
  while (name_end > 0 && text[name_end - 1] != ')') --name_end;
  return name_end > 0 && name_end + 1 < size && text[name_end + 1] == 'S';
}

long SegvAction(const KernelSigaction* set, KernelSigaction* get) {
  return Syscall(__NR_rt_sigaction, kSigsegv, Address(set), Address(get), sizeof(set->mask));
}

// Called by unmoor_stand_in in a thread of the program that is getting a SIGSEGV. Where to go on: 0
// lets the thread return and try its instruction again.
extern "C" __attribute__((used)) uint64_t unmoor_stand_in_choose(const KernelUcontext* context) {
  // SAFETY: our data lies behind our code (helper_protocol.h).
  auto& data = *reinterpret_cast<Data*>(unmoor_blob + kCodeSize);
  constexpr uint64_t kPageFault = 14, kOnWrite = 2;
  const KernelSigcontext& machine = context->mcontext;
  if (machine.trapno == kPageFault && (machine.err & kOnWrite) != 0 &&
      IsGuarded(data, machine.cr2)) {
    return 0;
  }
  const uint64_t handler = data.segv_action[0];
  KernelSigaction own{handler, data.segv_action[1], data.segv_action[2], data.segv_action[3]};
  const bool once = (own.flags & kResetHand) != 0;
  if (handler > 1 && !once) return handler;
  own.handler = handler > 1 ? 0 : handler;
  SegvAction(&own, nullptr);
  if (handler == 0) {
    Syscall(__NR_tgkill, Syscall(__NR_getpid), Syscall(__NR_gettid), kSigsegv);
  }
  return handler > 1 ? handler : 0;
}

// The program's action, with a handler that drops what only the guard has caused before it goes on
// to the program's own. Everything else about a delivery stays as the program wants it.
void StandIn(Data& data) {
  KernelSigaction own{};
  SegvAction(nullptr, &own);
  data.segv_action[0] = own.handler;
  data.segv_action[1] = own.flags;
  data.segv_action[2] = own.restorer;
  data.segv_action[3] = own.mask;
  KernelSigaction ours = own;
  ours.flags &= ~kResetHand;
  if (own.handler <= 1) {
    ours.flags = 0x04000000 /*SA_RESTORER*/ | 0x08000000 /*SA_ONSTACK*/ | 0x4 /*SA_SIGINFO*/;
    ours.restorer = static_cast<uint64_t>(Address(unmoor_restorer));
    ours.mask = 0;
  }
  ours.handler = static_cast<uint64_t>(Address(unmoor_stand_in));
  SegvAction(&ours, nullptr);
}

// Whatever signal the thread was held with, or was about to get, it has taken. A thread that merely
// got a CPU may have lost it again before that.
bool HasTakenIts(int tid, uint64_t ran) {
  constexpr uint64_t kEnough = 1'000'000;
  const uint64_t now = RunTime(tid);
  return now < ran || now - ran >= kEnough || (now != ran && Sleeps(tid));
}

// Once every thread that was held has taken its signal.
void StandDown(Data& data) {
  constexpr int kTurns = 10'000;
  for (int turn = 0; turn < kTurns; ++turn) {
    bool waiting = false;
    for (uint32_t i = 0; i < data.thread_count && i < kMaxThreads && !waiting; ++i) {
      waiting = data.ran[i] != 0 && !HasTakenIts(data.threads[i].tid, data.ran[i]);
    }
    if (!waiting && turn > 0) break;
    const int64_t nap[2] = {0, 1'000'000};
    Syscall(__NR_nanosleep, Address(nap), 0);
  }
  KernelSigaction now{};
  SegvAction(nullptr, &now);
  if (now.handler != static_cast<uint64_t>(Address(unmoor_stand_in))) return;
  const KernelSigaction own{data.segv_action[0], data.segv_action[1], data.segv_action[2],
                            data.segv_action[3]};
  SegvAction(&own, nullptr);
}

// The helper is ending, with all it traces still held.
void Heal(Data& data) {
  FutexSet(&data.watch_state, kWatchHealing);
  const bool guarded = data.guard_active != 0;
  if (guarded) {
    Unguard(data);
    StandIn(data);
    for (uint32_t i = 0; i < data.thread_count && i < kMaxThreads; ++i) {
      data.ran[i] = RunTime(data.threads[i].tid);
    }
  }
  Syscall(__NR_ptrace, PTRACE_DETACH, data.helper_tid, 0, 0);
  constexpr long kWall = 0x40000000;
  int status = 0;
  while (Syscall(__NR_wait4, data.helper_tid, Address(&status), kWall, 0) == -kEintr) {
  }
  if (guarded) StandDown(data);
}

// Traces the helper until it asks to be let go, or ends. False: it ended.
bool WatchHelper(Data& data) {
  const long error = Syscall(__NR_ptrace, PTRACE_SEIZE, data.helper_tid, 0, PTRACE_O_TRACEEXIT);
  FutexSet(&data.watch_state, error < 0 ? kWatchRefused : kWatchArmed);
  if (error < 0) return true;
  for (;;) {
    constexpr long kWall = 0x40000000, kNoThread = 0x20000000;
    int status = 0;
    const long waited =
        Syscall(__NR_wait4, data.helper_tid, Address(&status), kWall | kNoThread, 0);
    if (waited == -kEintr) continue;
    if (waited < 0 || (status & 0xff) != 0x7f) return false;
    const int event = status >> 16, signal = status >> 8 & 0xff;
    if (event == PTRACE_EVENT_EXIT) {
      Heal(data);
      return false;
    }
    if (event == 0 && signal == kSigtrap && Load(data.watch_request) == kRequestRelease) {
      FutexSet(&data.watch_request, kRequestNone);
      FutexSet(&data.watch_state, kWatchIdle);
      // Killed just now it cannot be let go any more, and waits for us at its end.
      if (Syscall(__NR_ptrace, PTRACE_DETACH, data.helper_tid, 0, 0) < 0) continue;
      return true;
    }
    Syscall(__NR_ptrace, PTRACE_CONT, data.helper_tid, 0, event != 0 ? 0 : signal);
  }
}

extern "C" [[noreturn]] __attribute__((used)) void unmoor_watch_main(Data* data_pointer) {
  Data& data = *data_pointer;
  // Its table of descriptors is its own, its signals are all blocked since it was made.
  Syscall(__NR_close_range, 0, 0xffffffffL, 0);
  char name[16] = {'u', 'n', 'm', 'o', 'o', 'r', '-', 'w', 'a', 't', 'c', 'h', 0};
  Syscall(__NR_prctl, PR_SET_NAME, Address(name));
  constexpr int64_t kLook = 50'000'000;
  for (;;) {
    const uint32_t request = Load(data.watch_request);
    if (request == kRequestLeave || __atomic_load_n(&data.helper_alive, __ATOMIC_ACQUIRE) == 0) {
      break;
    }
    if (request == kRequestArm && Load(data.watch_state) == kWatchIdle) {
      if (!WatchHelper(data)) break;
      continue;
    }
    FutexWait(&data.watch_request, request, kLook);
  }
  for (;;) Syscall(__NR_exit, 0);
}

// The first bytes of the blob: magic, then the code a thread of the program is made to run once for
// the helper, once for the watch. The injector sets rax … r8 for clone and stops the thread at the
// end of the system call. On top of the helper's stack it finds the address of its data and how
// much from there on is to be writable: all is mapped readable and executable, and the helper
// changes that (mprotect 10, PROT_READ | PROT_WRITE 3) before it uses its stack, or ends
// (exit_group 231).
asm(R"(
.section .entry, "ax"
.global unmoor_blob
.hidden unmoor_blob
unmoor_blob:
.ascii "UNMOOR-HELPER"
.zero 3
.global unmoor_spawn
unmoor_spawn:
  syscall
  test %eax, %eax
  jz unmoor_spawned
  ud2
.org 64
.global unmoor_spawn_watch
unmoor_spawn_watch:
  syscall
  test %eax, %eax
  jz 2f
  ud2
2:
  xor %ebp, %ebp
  mov (%rsp), %rdi
  and $-16, %rsp
  call unmoor_watch_main
  ud2
.text
unmoor_spawned:
  mov (%rsp), %rdi
  mov 8(%rsp), %rsi
  mov $3, %edx
  mov $10, %eax
  syscall
  test %eax, %eax
  jnz 1f
  xor %ebp, %ebp
  mov (%rsp), %rdi
  and $-16, %rsp
  call unmoor_helper_main
1:
  mov $1, %edi
  mov $231, %eax
  syscall
  ud2
.global unmoor_stand_in
.hidden unmoor_stand_in
unmoor_stand_in:
  push %rdi
  push %rsi
  push %rdx
  mov %rdx, %rdi
  cld
  call unmoor_stand_in_choose
  pop %rdx
  pop %rsi
  pop %rdi
  test %rax, %rax
  jz 1f
  jmp *%rax
1:
  ret
)");

}  // namespace
}  // namespace unmoor::helper
