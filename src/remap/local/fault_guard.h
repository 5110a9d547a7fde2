// Freestanding. The SIGSEGV handler of guarded pieces and of the mprotect tracker, in front of the
// program's own.
//
//   word even: no guard                              writer: writes
//     │ RaiseGuard: range, protection, +1                │ SIGSEGV
//   odd: the piece is read-only                          │ in the range: waits while the word is so
//     │ recheck, swap                                    │ gone meanwhile, page writable: back at
//     once │ LowerGuard: +1, all woken                        │ anybody else's fault: the handler
//     before
//   even                                             writer: the write again
//
// The program's handler gets every fault that is not ours as the kernel would have given it:
// siginfo, context, mask, SA_RESETHAND; ours stands on the alternate stack only where its own
// would. A handler installed after ours is found (EnsureFaultHandler) and ours put in front again;
// should it call ours as the one it replaced, then or when ours has been let go, the fault goes on
// to the one before. No guard is up while a handler of the program's runs with SIGSEGV blocked. In
// a forked child a piece guarded at that moment gets its protection back at the first write; a
// child that shares our memory (vfork, CLONE_VM) waits like a thread.
#pragma once

#include <cstdint>

namespace unmoor::local {

// Before each guard. How often it was put in front of something so far, or -errno. After a new
// number, children under way (their handlers were copied already, their memory was not) have to be
// waited for.
long EnsureFaultHandler();
// When no guard and no tracker needs it any more: gives way to the handler before, unless the
// program has put its own in front.
void ReleaseFaultHandler();

// One guard at a time (Locks::address_space). The caller protects the parts after Raise, once no
// thread has SIGSEGV blocked, and gives all of them their protection back before Lower.
struct Part;  // window.h
void RaiseGuard(uint64_t begin, uint64_t end, int protection, const Part* parts, uint32_t count);
void LowerGuard();
// Threads of this process that wait for it to be lowered, with all signals blocked.
uint32_t WaitingForGuard();

struct GuardCounts {
  uint64_t faults = 0;
  int64_t waited_ns = 0;
};
GuardCounts ReadGuardCounts();  // since the process began

// Memory tracked by protection: a write to a protected page sets its bit and makes it writable.
// False when there is no slot left.
bool AddProtectedRange(uint64_t begin, uint64_t end, int protection, uint64_t* bits);
void RemoveProtectedRange(uint64_t begin);

}  // namespace unmoor::local
