// Freestanding. See rendezvous.h. No libc, no allocation, no stack protector, no sanitizers: parts
// of this run as a signal handler, the rest while every thread of the program is stopped.
#include "remap/local/rendezvous.h"

#include <sys/stat.h>

#include "os/kernel_abi.h"
#include "os/raw_syscall.h"

namespace unmoor::local {

using raw::Address;
using raw::Call;

namespace {

constexpr uint64_t kMagic = 0x756e6d6f6f720001;  // in a signal's value: "unmoor", form 1
constexpr int64_t kPostAgain = 50'000'000;
constexpr int64_t kLookAgain = 200'000;
constexpr int kSiQueue = -1;
constexpr uint64_t kPage = 4096, kEntrySize = 32;  // a linux_dirent64 of a thread
constexpr long kEoverflow = 75, kEnoent = 2;
constexpr uint64_t kSaSiginfo = 4, kSaOnStack = 0x08000000, kSaRestart = 0x10000000,
                   kSaRestorer = 0x04000000;

struct SignalInfo {  // siginfo_t, as rt_tgsigqueueinfo takes it
  int32_t signo, error, code, padding;
  int32_t pid;
  uint32_t uid;
  uint64_t value;
  uint64_t rest[12];
};
static_assert(sizeof(SignalInfo) == 128);

struct Slot {
  int32_t tid;
  uint32_t pending;  // a signal is on its way and its handler has not begun
  uint32_t acked;    // the window it waits in
  uint32_t seen;     // the handler has run: what follows is known
  int64_t posted_at;
  uint64_t stack, local_storage, alternate, alternate_size;
};

struct State {
  uint32_t window = 0;   // odd: open
  uint32_t arrived = 0;  // counts acknowledgements
  int32_t signal = 0;
  uint32_t used = 0;
  uint32_t inside = 0;                   // handlers, each with a slot of its own
  uint32_t forgetting = 0;               // nobody may begin to use one
  uint64_t installed = 0;                // bit n-1: signal n
  kernel::KernelSigaction before[64]{};  // what each was put in front of
  int32_t events_thread = 0;
  int32_t opener = 0;  // of the window
  uint32_t most_threads = kMaxThreads;
  alignas(kPage) Slot slots[kThreadSlots] = {};
  char entries[kMaxThreads * kEntrySize] = {};
};
State state;

struct DirectoryEntry {  // linux_dirent64
  uint64_t inode;
  int64_t offset;
  uint16_t length;
  uint8_t type;
  char name[1];
};

template <class T>
T Load(const T* from) {
  return __atomic_load_n(from, __ATOMIC_SEQ_CST);
}
template <class T>
void Store(T* to, T value) {
  __atomic_store_n(to, value, __ATOMIC_SEQ_CST);
}

Slot* Find(int tid) {
  auto i = static_cast<uint32_t>(tid) * 2654435761u;
  for (uint32_t n = 0; n < kThreadSlots; ++n, ++i) {
    Slot& slot = state.slots[i % kThreadSlots];
    const int32_t found = Load(&slot.tid);
    if (found == tid) return &slot;
    if (found == 0) return nullptr;
  }
  return nullptr;
}

Slot* FindOrAdd(int tid) {
  if (Slot* slot = Find(tid)) return slot;
  if (state.used >= state.most_threads) return nullptr;
  auto i = static_cast<uint32_t>(tid) * 2654435761u;
  while (state.slots[i % kThreadSlots].tid != 0) ++i;
  Slot& slot = state.slots[i % kThreadSlots];
  slot.pending = slot.acked = slot.seen = 0;
  ++state.used;
  Store(&slot.tid, tid);
  return &slot;
}

void ClearSlots() {
  constexpr long kDontNeed = 4;
  const uint64_t whole = sizeof(state.slots) / kPage * kPage;
  // Refused where memory is locked.
  if (Call(__NR_madvise, Address(state.slots), raw::Word(whole), kDontNeed) < 0) {
    for (Slot& slot : state.slots) {
      if (Load(&slot.tid) != 0) Store(&slot.tid, 0);
    }
  }
  state.used = 0;
}
static_assert(sizeof(Slot) * kThreadSlots % kPage == 0);

// Of threads long gone too. A handler that finds no slot returns; its thread is signalled again
// when the next window lists it. But one that is still on its way out of an earlier window, for
// want of a CPU, would acknowledge the next one for whoever has its slot then: so not while any is
// inside. With no window open they leave; else another window will find nobody.
void ForgetThreads() {
  constexpr int64_t kPatience = 100'000'000;
  const int64_t until = raw::Now() + kPatience;
  Store(&state.forgetting, 1u);
  while (Load(&state.inside) != 0 && raw::Now() < until) raw::Sleep(20'000);
  if (Load(&state.inside) == 0) ClearSlots();
  Store(&state.forgetting, 0u);
}

bool IsOwn(int tid) {
  return tid == state.opener || tid == Load(&state.events_thread);
}

long Post(int tid) {
  SignalInfo info{};
  info.signo = state.signal;
  info.code = kSiQueue;
  info.pid = raw::ProcessId();
  info.uid = static_cast<uint32_t>(Call(__NR_getuid));
  info.value = kMagic;
  return Call(__NR_rt_tgsigqueueinfo, info.pid, tid, state.signal, Address(&info));
}

// Acknowledges and waits until the window is no longer `window`. One piece of assembly, so that the
// compiler puts nothing on the stack in between.
void WaitInWindow(uint32_t window, uint32_t* acked) {
  asm volatile(
      "movl %k[window], (%[acked])\n"
      "lock incl (%[arrived])\n"
      "movl $202, %%eax\n"  // futex(&arrived, FUTEX_WAKE_PRIVATE, 1)
      "movq %[arrived], %%rdi\n"
      "movl $129, %%esi\n"
      "movl $1, %%edx\n"
      "syscall\n"
      "1:\n"
      "movl $202, %%eax\n"  // futex(&window, FUTEX_WAIT_PRIVATE, window, 0)
      "movq %[word], %%rdi\n"
      "movl $128, %%esi\n"
      "movl %k[window], %%edx\n"
      "xorl %%r10d, %%r10d\n"
      "syscall\n"
      "cmpl %k[window], (%[word])\n"
      "je 1b\n"
      :
      : [window] "b"(window), [acked] "r"(acked), [arrived] "r"(&state.arrived),
        [word] "r"(&state.window)
      : "rax", "rcx", "rdx", "rsi", "rdi", "r10", "r11", "memory", "cc");
}

extern "C" void unmoor_freeze_restorer();
asm(R"(
.pushsection .text
.hidden unmoor_freeze_restorer
.global unmoor_freeze_restorer
.type unmoor_freeze_restorer, @function
unmoor_freeze_restorer:
  mov $15, %eax
  syscall
.popsection
)");

void PassOn(int signal, SignalInfo* info, void* context) {
  const auto& before = state.before[signal - 1];
  if (before.handler < 2) return;  // SIG_DFL, SIG_IGN: nobody else means this signal
  if ((before.flags & kSaSiginfo) != 0) {
    // SAFETY: the handler that was installed, called as the kernel would.
    reinterpret_cast<void (*)(int, SignalInfo*, void*)>(before.handler)(signal, info, context);
  } else {
    reinterpret_cast<void (*)(int)>(before.handler)(signal);
  }
}

struct Inside {
  Inside() { __atomic_add_fetch(&state.inside, 1, __ATOMIC_SEQ_CST); }
  ~Inside() { __atomic_sub_fetch(&state.inside, 1, __ATOMIC_SEQ_CST); }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
};

void FreezeHandler(int signal, SignalInfo* info, kernel::KernelUcontext* context) {
  if (info->code != kSiQueue || info->value != kMagic) return PassOn(signal, info, context);
  const Inside inside;
  Slot* slot = Load(&state.forgetting) == 0 ? Find(raw::ThreadId()) : nullptr;
  if (slot == nullptr) return;
  slot->stack = context->mcontext.rsp;
  slot->alternate = context->stack[0];
  slot->alternate_size = context->stack[2];
  asm("movq %%fs:0, %0" : "=r"(slot->local_storage));
  Store(&slot->seen, 1u);
  Store(&slot->pending, 0u);
  for (;;) {
    const uint32_t window = Load(&state.window);
    if ((window & 1) == 0) return;
    WaitInWindow(window, &slot->acked);
  }
}

// visit(tid) for each thread in the first `bytes` of the entries, until one returns an error.
template <class Visit>
long ForEachEntry(long bytes, Visit visit) {
  for (long at = 0; at < bytes;) {
    // SAFETY: the kernel fills the buffer with such records.
    const auto* entry = reinterpret_cast<const DirectoryEntry*>(state.entries + at);
    at += entry->length;
    int tid = 0;
    for (const char* p = entry->name; *p >= '0' && *p <= '9'; ++p) tid = tid * 10 + (*p - '0');
    if (tid == 0) continue;
    if (const long error = visit(tid); error < 0) return error;
  }
  return 0;
}

bool IsHeld(int tid, uint32_t window) {
  const Slot* slot = (window & 1) != 0 ? Find(tid) : nullptr;
  return slot != nullptr && Load(&slot->acked) == window;
}

// The number of threads, ended leader included; or -errno.
long ThreadCount(int task_fd) {
  struct stat status{};
  const long error = Call(__NR_fstat, task_fd, Address(&status));
  return error < 0 ? error : static_cast<long>(status.st_nlink) - 2;
}

enum : long { kIncomplete = 0, kComplete = 1 };

// Calls visit(tid) for every listed thread that is not ours. -errno when they cannot be listed.
//
// A thread that ends just as it is listed, or was about to be, ends the list as well (next_tid in
// the kernel's fs/proc/base.c), whatever comes after it. Complete: that has not happened. There are
// as many threads as were listed, and after they were counted all listed are still there.
template <class Visit>
long ForEachThread(int task_fd, Visit visit) {
  state.opener = raw::ThreadId();  // only under the lock
  if (const long error = Call(__NR_lseek, task_fd, 0, 0); error < 0) return error;
  const long bytes = Call(__NR_getdents64, task_fd, Address(state.entries), sizeof(state.entries));
  if (bytes < 0) return bytes;
  if (static_cast<uint64_t>(bytes) + kEntrySize > sizeof(state.entries)) return -kEoverflow;
  long listed = 0;
  const long error = ForEachEntry(bytes, [&](int tid) -> long {
    ++listed;
    return IsOwn(tid) ? 0 : visit(tid);
  });
  if (error < 0) return error;
  if (ThreadCount(task_fd) != listed) return kIncomplete;
  const uint32_t window = Load(&state.window);
  const int process = raw::ProcessId();
  const long gone = ForEachEntry(bytes, [&](int tid) -> long {
    return IsHeld(tid, window) ? 0 : Call(__NR_tgkill, process, tid, 0);
  });
  return gone < 0 ? kIncomplete : kComplete;
}

// task/<tid>/<file> into `text`. The number of bytes, or -errno.
long ReadThreadFile(int task_fd, int tid, const char* file, char* text, long size) {
  char path[40];
  char digits[12];
  int count = 0;
  for (int rest = tid; rest > 0; rest /= 10) digits[count++] = static_cast<char>('0' + rest % 10);
  int length = 0;
  while (count > 0) path[length++] = digits[--count];
  for (const char* p = file; *p != 0; ++p) path[length++] = *p;
  path[length] = 0;
  const long fd = Call(__NR_openat, task_fd, Address(path), 02000000 /*O_CLOEXEC*/, 0);
  if (fd < 0) return fd;
  const long read = Call(__NR_read, fd, Address(text), size);
  Call(__NR_close, fd);
  return read;
}

// A leader that has ended stays listed as long as other threads live. What cannot be told, for want
// of a descriptor, has not ended.
bool HasEnded(int task_fd, int tid) {
  char text[512];
  const long size = ReadThreadFile(task_fd, tid, "/stat", text, sizeof(text));
  if (size <= 0) return size == 0 || size == -kEnoent || size == -raw::kEsrch;
  long paren = 0;
  for (long i = 0; i < size; ++i) {
    if (text[i] == ')') paren = i;
  }
  return paren + 2 < size && (text[paren + 2] == 'Z' || text[paren + 2] == 'X');
}

bool ParseNumber(const char*& p, uint64_t& value) {
  while (*p == ' ') ++p;
  const bool hex = p[0] == '0' && p[1] == 'x';
  if (hex) p += 2;
  bool any = false;
  for (value = 0;; ++p, any = true) {
    uint64_t digit;
    if (*p >= '0' && *p <= '9') {
      digit = static_cast<uint64_t>(*p - '0');
    } else if (hex && *p >= 'a' && *p <= 'f') {
      digit = static_cast<uint64_t>(*p - 'a' + 10);
    } else {
      return any;
    }
    value = value * (hex ? 16 : 10) + digit;
  }
}

enum class Sleep { kNot, kOutsideCalls, kInCall };

Sleep ReadSleepingCall(int task_fd, int tid, SleepingCall& call) {
  char text[256];
  const long size = ReadThreadFile(task_fd, tid, "/syscall", text, sizeof(text) - 1);
  if (size <= 0) return Sleep::kNot;
  text[size] = 0;
  const char* p = text;
  if (p[0] == '-') return Sleep::kOutsideCalls;  // of a fault
  if (!ParseNumber(p, call.number)) return Sleep::kNot;
  for (uint64_t& arg : call.args) {
    if (!ParseNumber(p, arg)) return Sleep::kNot;
  }
  return Sleep::kInCall;
}

// True also when that cannot be told.
bool Blocks(int task_fd, int tid, int signal) {
  char text[4096];
  const long size = ReadThreadFile(task_fd, tid, "/status", text, sizeof(text));
  if (size == -kEnoent || size == -raw::kEsrch) return false;
  for (long i = 0; i + 8 < size; ++i) {
    if (text[i] != '\n' || text[i + 1] != 'S' || text[i + 4] != 'B' || text[i + 5] != 'l' ||
        text[i + 7] != ':') {
      continue;
    }
    uint64_t mask = 0;
    for (i += 9; i < size && text[i] != '\n'; ++i) {
      const char c = text[i];
      mask = mask << 4 | static_cast<uint64_t>(c <= '9' ? c - '0' : c - 'a' + 10);
    }
    return (mask >> (signal - 1) & 1) != 0;
  }
  return true;
}

struct Look {
  uint32_t threads = 0;
  uint32_t late = 0;
  int late_thread = 0;
  uint32_t found = 0;
  bool complete = false;
};

// One look at every thread; a signal to each that neither waits in `window` nor has one on its way.
// -EAGAIN: there is no room until those that have ended are forgotten, or a signal cannot be sent
// for now. -EOVERFLOW: there are too many threads.
long LookAndPost(int task_fd, uint32_t window, int64_t now, bool check_ended, Look& look) {
  bool room = true;
  const long listed = ForEachThread(task_fd, [&](int tid) -> long {
    ++look.threads;
    Slot* slot = FindOrAdd(tid);
    room = room && slot != nullptr;
    if (slot == nullptr) return 0;
    if (Load(&slot->acked) == window) return 0;
    if (check_ended && HasEnded(task_fd, tid)) return 0;
    if (Load(&slot->pending) == 0 || now - slot->posted_at > kPostAgain) {
      Store(&slot->pending, 1u);
      slot->posted_at = now;
      const long error = Post(tid);
      if (error == -raw::kEsrch) return 0;
      if (error < 0) {
        Store(&slot->pending, 0u);
        return error;
      }
      ++look.found;
    }
    ++look.late;
    look.late_thread = tid;
    return 0;
  });
  look.complete = listed == kComplete;
  if (listed >= 0 && !room) {
    return look.threads > state.most_threads ? -kEoverflow : -raw::kEagain;
  }
  return listed < 0 ? listed : 0;
}

uint32_t BeginWindow() {
  if (state.used > state.most_threads * 3 / 4) ForgetThreads();
  const uint32_t window = state.window + 1;
  Store(&state.window, window);
  return window;
}

void Gather(int task_fd, uint32_t window, int64_t limit_ns, WindowAttempt& attempt) {
  const int64_t began = raw::Now();
  for (int64_t now = began;; now = raw::Now()) {
    const uint32_t seen = Load(&state.arrived);
    Look look;
    attempt.error = LookAndPost(task_fd, window, now, now - began > kLookAgain, look);
    if (attempt.error < 0) return;
    attempt.threads = look.threads;
    attempt.late_thread = look.late_thread;
    // Everybody is in, and none can be born now.
    attempt.open = look.late == 0 && look.complete;
    if (attempt.open || now - began > limit_ns) return;
    // All the signals sent above are answered before the next look, but for a thread that ends.
    const int64_t until = now + kLookAgain;
    for (uint32_t have = seen; have - seen < look.late && raw::Now() < until;) {
      raw::FutexWait(&state.arrived, have, kLookAgain);
      have = Load(&state.arrived);
    }
  }
}

}  // namespace

long InstallFreezeHandler(int signal) {
  const uint64_t bit = uint64_t{1} << (signal - 1);
  if ((state.installed & bit) != 0) {
    state.signal = signal;
    return 0;
  }
  kernel::KernelSigaction action{};
  // SAFETY: the kernel calls it with these arguments (SA_SIGINFO).
  action.handler = reinterpret_cast<uint64_t>(&FreezeHandler);
  action.flags = kSaSiginfo | kSaOnStack | kSaRestart | kSaRestorer;
  action.restorer = reinterpret_cast<uint64_t>(&unmoor_freeze_restorer);
  action.mask = ~uint64_t{0};
  const long error = Call(__NR_rt_sigaction, signal, Address(&action),
                          Address(&state.before[signal - 1]), sizeof(action.mask));
  if (error < 0) return error;
  state.installed |= bit;
  state.signal = signal;
  return 0;
}

int FreezeSignal() {
  return state.signal;
}

void AddEventsThread() {
  Store(&state.events_thread, raw::ThreadId());
}

void RemoveEventsThread() {
  Store(&state.events_thread, 0);
}

void UnblockFreezeSignal() {
  const uint64_t mask = uint64_t{1}
                        << ((state.signal == 0 ? kDefaultFreezeSignal : state.signal) - 1);
  Call(__NR_rt_sigprocmask, 1 /*SIG_UNBLOCK*/, Address(&mask), 0, sizeof(mask));
}

WindowAttempt AwaitEverybody(int task_fd, int64_t limit_ns) {
  WindowAttempt attempt;
  Gather(task_fd, state.window, limit_ns, attempt);
  return attempt;
}

long HoldReturns(int task_fd) {
  constexpr int64_t kLimit = 1'000'000'000;
  const uint32_t window = BeginWindow();
  const int64_t began = raw::Now();
  for (int64_t now = began; now - began < kLimit; now = raw::Now()) {
    Look look;
    const long error = LookAndPost(task_fd, window, now, false, look);
    if (error < 0 || (look.found == 0 && look.complete)) return error;
  }
  return -raw::kEagain;
}

void CloseWindow() {
  __atomic_add_fetch(&state.window, 1, __ATOMIC_SEQ_CST);
  raw::FutexWake(&state.window, 0x7fffffff);
}

bool LocalStorageIsQuiet(int task_fd, uint64_t begin, uint64_t end, int64_t limit_ns) {
  constexpr uint64_t kAround = 1 << 16;  // static thread-local storage below, struct pthread above
  const int64_t until = raw::Now() + limit_ns;
  bool listed = true;
  const long error = ForEachThread(task_fd, [&](int tid) -> long {
    const Slot* slot = Find(tid);
    if (slot == nullptr || slot->acked != state.window) return 0;  // it has ended
    if (slot->local_storage + kAround < begin || slot->local_storage >= end + kAround) return 0;
    for (;;) {
      SleepingCall call{};
      if (ReadSleepingCall(task_fd, tid, call) == Sleep::kInCall && call.number == __NR_futex &&
          call.args[0] == static_cast<uint64_t>(Address(&state.window))) {
        return 0;
      }
      if (raw::Now() > until) {
        listed = false;
        return 0;
      }
      Call(__NR_sched_yield);
    }
  });
  return listed && error >= 0;
}

bool HoldsThreadMemory(int task_fd, uint64_t begin, uint64_t end) {
  constexpr uint64_t kAround = 1 << 16;
  constexpr int64_t kLimit = 2'000'000;
  const int64_t until = raw::Now() + kLimit;
  const auto inside = [&](uint64_t at) { return at + kAround >= begin && at < end + kAround; };
  for (;;) {
    bool unknown = false;
    bool found = false;
    const long listed = ForEachThread(task_fd, [&](int tid) -> long {
      Slot* slot = FindOrAdd(tid);
      if (slot == nullptr) return -kEoverflow;
      if (Load(&slot->seen) == 0) {
        unknown = true;
        if (Load(&slot->pending) == 0) {
          Store(&slot->pending, 1u);
          slot->posted_at = raw::Now();
          Post(tid);
        }
        return 0;
      }
      found = found || inside(slot->stack) || inside(slot->local_storage) ||
              (slot->alternate_size != 0 && slot->alternate < end &&
               begin < slot->alternate + slot->alternate_size);
      return 0;
    });
    if (listed < 0 || found) return true;
    if (!unknown && listed == kComplete) return false;
    if (raw::Now() > until) return true;
    raw::Sleep(20'000);
  }
}

long CountBlocking(int task_fd, int signal) {
  constexpr int64_t kLimit = 2'000'000;
  const int64_t until = raw::Now() + kLimit;
  for (;;) {
    long blocked = 0;
    const long listed = ForEachThread(task_fd, [&](int tid) -> long {
      blocked += Blocks(task_fd, tid, signal) ? 1 : 0;
      return 0;
    });
    if (listed < 0) return listed;
    if (listed == kComplete) return blocked;
    if (raw::Now() > until) return -raw::kEagain;
  }
}

uint32_t CountThreads(int task_fd) {
  uint32_t threads = 0;
  const long listed = ForEachThread(task_fd, [&](int) -> long {
    ++threads;
    return 0;
  });
  return listed == kComplete ? threads : 0;
}

void ForEachSleeping(int task_fd, void (*visit)(void* context, const SleepingCall& call),
                     void* context) {
  ForEachThread(task_fd, [&](int tid) -> long {
    SleepingCall call{};
    if (ReadSleepingCall(task_fd, tid, call) == Sleep::kInCall) visit(context, call);
    return 0;
  });
}

bool VisitUntilSettled(int task_fd, void (*visit)(void* context, const SleepingCall& call),
                       void* context, int64_t limit_ns) {
  constexpr int64_t kBirth = 2'000'000;
  const int64_t began = raw::Now();
  for (bool was_held = false;;) {
    // One born since the last look must not get past the handler either.
    Look look;
    const long error = LookAndPost(task_fd, state.window, raw::Now(), false, look);
    if (error < 0) return false;
    const bool held = look.complete && look.found == 0;
    const int64_t waited = raw::Now() - began;
    bool settled = true;
    const long listed = ForEachThread(task_fd, [&](int tid) -> long {
      const Slot* slot = Find(tid);
      if (slot != nullptr && Load(&slot->acked) == state.window) return 0;
      SleepingCall call{};
      const Sleep sleep = ReadSleepingCall(task_fd, tid, call);
      if (sleep == Sleep::kInCall) visit(context, call);
      // What is being born has no signal. (One that waits for its vfork has been given birth to.)
      const bool gives_birth =
          sleep == Sleep::kInCall && (call.number == __NR_clone || call.number == __NR_clone3);
      if (slot == nullptr || (gives_birth && waited < kBirth) ||
          (sleep == Sleep::kNot && !HasEnded(task_fd, tid))) {
        settled = false;
      }
      return 0;
    });
    if (listed < 0) return false;
    if (held && settled && listed == kComplete) return true;
    // What does not sleep, for want of a CPU, does not get past the handler either.
    if (waited > limit_ns && held && was_held) return true;
    if (waited > 2 * limit_ns) return false;
    was_held = held;
    raw::Sleep(10'000);
  }
}

void LimitThreads(uint32_t most) {
  state.most_threads = most;
}

void ResetAfterFork() {
  if ((state.window & 1) != 0) state.window += 1;
  state.events_thread = state.opener = 0;
  state.inside = 0;
  ClearSlots();
}

}  // namespace unmoor::local
