// Freestanding. See fault_guard.h. Runs as a signal handler on any thread: no libc, no allocation,
// no locks, no sanitizers.
#include "remap/local/fault_guard.h"

#include "os/kernel_abi.h"
#include "os/raw_syscall.h"
#include "remap/local/window.h"

namespace unmoor::local {

using raw::Address;
using raw::Call;

namespace {

constexpr int kSigsegv = 11, kSegvAccerr = 2;
constexpr uint64_t kWriteFault = 2;                 // of the page fault's error code
constexpr long kWipeOnFork = 18, kKeepOnFork = 19;  // MADV_…
constexpr uint64_t kSaSiginfo = 4, kSaOnStack = 0x08000000, kSaRestart = 0x10000000,
                   kSaNoDefer = 0x40000000, kSaResetHand = 0x80000000, kSaRestorer = 0x04000000;
constexpr uint32_t kMaxActions = 16;
constexpr uint64_t kPassed = 0x756e6d6f6f720000;  // "unmoor", and a level: see PassOn
constexpr uint32_t kMaxProtected = 256;

struct FaultInfo {  // siginfo_t of a fault
  int32_t signo, error, code, padding;
  uint64_t address;
  uint64_t rest[12];
  uint64_t passed;  // unused by the kernel, which clears it
};
static_assert(sizeof(FaultInfo) == 128);

struct ProtectedRange {
  uint64_t begin, end;  // end 0: free
  int protection;
  uint64_t* bits;
};

struct State {
  uint32_t word = 0;
  uint64_t begin = 0, end = 0;
  int32_t protection = 0;
  const Part* parts = nullptr;
  uint32_t part_count = 0;
  int32_t owner = 0;     // process that raised it
  uint32_t waiting = 0;  // of its threads, in our handler until the guard is lowered
  uint64_t faults = 0;
  int64_t waited_ns = 0;
  // What ours was put in front of, oldest first.
  kernel::KernelSigaction actions[kMaxActions] = {};
  uint32_t action_count = 0;
  uint32_t installs = 0;
  ProtectedRange ranges[kMaxProtected] = {};
};
State state;

// A page that is zero in a forked child (MADV_WIPEONFORK), and the same in one that shares our
// memory.
alignas(4096) uint32_t raised_here[1024] = {};

template <class T>
T Load(const T* from) {
  return __atomic_load_n(from, __ATOMIC_SEQ_CST);
}
template <class T>
void Store(T* to, T value) {
  __atomic_store_n(to, value, __ATOMIC_SEQ_CST);
}

extern "C" void unmoor_fault_restorer();
asm(R"(
.pushsection .text
.hidden unmoor_fault_restorer
.global unmoor_fault_restorer
.type unmoor_fault_restorer, @function
unmoor_fault_restorer:
  mov $15, %eax
  syscall
.popsection
)");

// By a write that changes nothing.
bool IsWritable(uint64_t at) {
  constexpr long kWakeOpPrivate = 5 | 128;
  constexpr long kOrNothing = 2L << 28 | 0x7ff;  // and wake nobody
  static uint32_t nobody = 0;
  return Call(__NR_futex, Address(&nobody), kWakeOpPrivate, 0, 0, raw::Word(at & ~uint64_t{3}),
              kOrNothing) >= 0;
}

// In a child forked with the guard up, whose remapper stayed behind: nobody else will lift it.
void LiftInherited(uint32_t word) {
  for (uint32_t i = 0; i < state.part_count; ++i) {
    const Part& part = state.parts[i];
    // SAFETY: the protection the part had.
    Call(__NR_mprotect, raw::Word(part.begin), raw::Word(part.end - part.begin), state.protection);
  }
  __atomic_compare_exchange_n(&state.word, &word, word + 1, false, __ATOMIC_SEQ_CST,
                              __ATOMIC_SEQ_CST);
}

void WaitWhile(uint32_t word) {
  const uint32_t counts = Load(&state.owner) == raw::ProcessId() ? 1 : 0;
  __atomic_add_fetch(&state.waiting, counts, __ATOMIC_SEQ_CST);
  while (Load(&state.word) == word) raw::FutexWait(&state.word, word);
  __atomic_sub_fetch(&state.waiting, counts, __ATOMIC_SEQ_CST);
}

// A write under the guard waits here for the piece. True when the write is to be tried again.
bool WaitForGuard(uint64_t at) {
  for (bool waited = false;; waited = true) {
    const uint32_t word = Load(&state.word);
    const bool inside = state.begin <= at && at < state.end;
    if ((word & 1) == 0 || !inside) return waited;
    if (Load(raised_here) == 0) {
      LiftInherited(word);
      return true;
    }
    const int64_t began = raw::Now();
    WaitWhile(word);
    if (!waited) __atomic_add_fetch(&state.faults, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&state.waited_ns, raw::Now() - began, __ATOMIC_RELAXED);
  }
}

// A handler of the program's runs with SIGSEGV blocked, so it must not meet a guard. Nothing is
// made read-only while a thread has it blocked (which ours has from its first instruction on) and
// does not wait here.
void WaitForNoGuard() {
  for (uint32_t word; ((word = Load(&state.word)) & 1) != 0 && Load(raised_here) != 0;) {
    WaitWhile(word);
  }
}

// The bit before the page becomes writable, for whoever writes there next and looks; and after, for
// a new baseline (bits cleared, then all protected) that came in between.
bool NoteProtectedWrite(uint64_t at) {
  for (const ProtectedRange& range : state.ranges) {
    const uint64_t end = Load(&range.end);
    if (end <= at || at < range.begin) continue;
    const uint64_t page = (at - range.begin) >> 12;
    const uint64_t bit = uint64_t{1} << (page % 64);
    __atomic_fetch_or(&range.bits[page / 64], bit, __ATOMIC_SEQ_CST);
    // SAFETY: the protection the page had before it was tracked.
    if (Call(__NR_mprotect, raw::Word(at & ~uint64_t{4095}), 4096, range.protection) < 0) {
      // No mapping to spare for a page apart: all of the range counts as written.
      for (uint64_t i = 0; i * 64 * 4096 < end - range.begin; ++i) {
        __atomic_store_n(&range.bits[i], ~uint64_t{0}, __ATOMIC_SEQ_CST);
      }
      return Call(__NR_mprotect, raw::Word(range.begin), raw::Word(end - range.begin),
                  range.protection) == 0;
    }
    __atomic_fetch_or(&range.bits[page / 64], bit, __ATOMIC_SEQ_CST);
    return true;
  }
  return false;
}

// The kernel's own default: the fault again, without a handler.
void TakeDefault(const FaultInfo* info) {
  kernel::KernelSigaction action{};
  action.flags = kSaRestorer;
  action.restorer = reinterpret_cast<uint64_t>(&unmoor_fault_restorer);  // SAFETY: never returns
  Call(__NR_rt_sigaction, kSigsegv, Address(&action), 0, sizeof(action.mask));
  if (info->code <= 0) {  // sent by somebody: it would not come again
    Call(__NR_tgkill, raw::ProcessId(), raw::ThreadId(), kSigsegv);
  }
}

// Calls action `level` as the kernel would have. It may call the one it replaced, which is ours,
// with the same siginfo: that carries how far the fault has come.
void PassOn(uint32_t level, FaultInfo* info, kernel::KernelUcontext* context) {
  if (level == 0) return TakeDefault(info);
  kernel::KernelSigaction& slot = state.actions[level - 1];
  kernel::KernelSigaction action = slot;
  if ((action.flags & kSaResetHand) != 0) {
    action.handler = __atomic_exchange_n(&slot.handler, 0, __ATOMIC_SEQ_CST);
  }
  if (action.handler == 1 && info->code <= 0) return;  // SIG_IGN of a signal that was sent
  if (action.handler < 2) return TakeDefault(info);
  uint64_t mask = context->sigmask | action.mask;
  if ((action.flags & kSaNoDefer) == 0) mask |= uint64_t{1} << (kSigsegv - 1);
  Call(__NR_rt_sigprocmask, 2 /*SIG_SETMASK*/, Address(&mask), 0, sizeof(mask));
  info->passed = kPassed | level;
  if ((action.flags & kSaSiginfo) != 0) {
    // SAFETY: the program's handler, with what the kernel gave us for it.
    reinterpret_cast<void (*)(int, void*, void*)>(action.handler)(kSigsegv, info, context);
  } else {
    reinterpret_cast<void (*)(int)>(action.handler)(kSigsegv);
  }
}

void FaultHandler(int signal, FaultInfo* info, kernel::KernelUcontext* context);

uint64_t OwnAddress() {
  return reinterpret_cast<uint64_t>(&FaultHandler);  // SAFETY: compared, and given to the kernel
}

// How many of `actions` the fault has yet to see, when a handler of the program's calls ours: what
// that one replaced comes next. It stands in front of ours (which may have been let go), unless we
// passed the fault on to it.
uint32_t LevelBehindCaller(const FaultInfo* info) {
  const uint32_t count = Load(&state.action_count);
  if ((info->passed & ~uint64_t{0xff}) == kPassed) {
    const auto level = static_cast<uint32_t>(info->passed & 0xff);
    return level > 0 && level <= count ? level - 1 : 0;
  }
  kernel::KernelSigaction front{};
  Call(__NR_rt_sigaction, kSigsegv, 0, Address(&front), sizeof(front.mask));
  for (uint32_t level = count; level > 0; --level) {
    if (state.actions[level - 1].handler == front.handler) return level - 1;
  }
  return count;
}

__attribute__((noinline)) void FaultHandler(int /*signal*/, FaultInfo* info,
                                            kernel::KernelUcontext* context) {
  // SAFETY: only compared.
  const bool from_kernel =
      __builtin_return_address(0) == reinterpret_cast<void*>(&unmoor_fault_restorer);
  const bool write = info->code == kSegvAccerr && context->mcontext.trapno == 14 &&
                     (context->mcontext.err & kWriteFault) != 0;
  if (write) {
    if (WaitForGuard(info->address) || NoteProtectedWrite(info->address)) return;
    // The guard was lowered between the fault and now.
    if (IsWritable(info->address)) return;
  }
  WaitForNoGuard();
  PassOn(from_kernel ? Load(&state.action_count) : LevelBehindCaller(info), info, context);
}

}  // namespace

long EnsureFaultHandler() {
  kernel::KernelSigaction now{};
  const long error = Call(__NR_rt_sigaction, kSigsegv, 0, Address(&now), sizeof(now.mask));
  if (error < 0) return error;
  if (now.handler == OwnAddress()) return state.installs;
  // SAFETY: memory of ours alone.
  if (const long kept = Call(__NR_madvise, Address(raised_here), sizeof(raised_here), kWipeOnFork);
      kept < 0) {
    return kept;
  }
  const uint32_t count = state.action_count;
  const bool known = count > 0 && state.actions[count - 1].handler == now.handler &&
                     state.actions[count - 1].flags == now.flags;
  if (!known) {
    if (count == kMaxActions) return -28;  // ENOSPC: the program changes its handler without end
    state.actions[count] = now;
    Store(&state.action_count, count + 1);
  }
  kernel::KernelSigaction action{};
  action.handler = OwnAddress();
  action.flags = kSaSiginfo | kSaRestorer | (now.flags & kSaRestart) |
                 (now.handler < 2 ? kSaOnStack : now.flags & kSaOnStack);
  action.restorer = reinterpret_cast<uint64_t>(&unmoor_fault_restorer);
  action.mask = ~uint64_t{0};
  const long installed =
      Call(__NR_rt_sigaction, kSigsegv, Address(&action), 0, sizeof(action.mask));
  return installed < 0 ? installed : ++state.installs;
}

void ReleaseFaultHandler() {
  kernel::KernelSigaction now{};
  Call(__NR_rt_sigaction, kSigsegv, 0, Address(&now), sizeof(now.mask));
  Call(__NR_madvise, Address(raised_here), sizeof(raised_here), kKeepOnFork);
  if (now.handler != OwnAddress() || state.action_count == 0) return;
  Call(__NR_rt_sigaction, kSigsegv, Address(&state.actions[state.action_count - 1]), 0,
       sizeof(now.mask));
  // The older ones stay: a handler of the program's may still call ours as the one it replaced.
}

void RaiseGuard(uint64_t begin, uint64_t end, int protection, const Part* parts, uint32_t count) {
  state.begin = begin;
  state.end = end;
  state.protection = protection;
  state.parts = parts;
  state.part_count = count;
  Store(&state.owner, raw::ProcessId());
  Store(raised_here, 1u);
  Store(&state.word, (Load(&state.word) + 1) | 1);
}

void LowerGuard() {
  __atomic_add_fetch(&state.word, 1, __ATOMIC_SEQ_CST);
  raw::FutexWake(&state.word, 0x7fffffff);
}

uint32_t WaitingForGuard() {
  return Load(&state.waiting);
}

GuardCounts ReadGuardCounts() {
  return {__atomic_load_n(&state.faults, __ATOMIC_RELAXED),
          __atomic_load_n(&state.waited_ns, __ATOMIC_RELAXED)};
}

bool AddProtectedRange(uint64_t begin, uint64_t end, int protection, uint64_t* bits) {
  for (ProtectedRange& range : state.ranges) {
    if (range.end != 0) continue;
    range.begin = begin;
    range.protection = protection;
    range.bits = bits;
    Store(&range.end, end);
    return true;
  }
  return false;
}

void RemoveProtectedRange(uint64_t begin) {
  for (ProtectedRange& range : state.ranges) {
    if (range.end != 0 && range.begin == begin) Store(&range.end, uint64_t{0});
  }
}

}  // namespace unmoor::local
