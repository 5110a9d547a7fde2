// Freestanding. The rendezvous: every other thread of this process in our signal handler.
//
// A thread in the handler is in no system call, has nothing half-done in the kernel and writes no
// memory at all between its acknowledgement and the release: it waits with registers only. So while
// all are there, memory holds still.
//
//   window even: closed                         thread: running
//     │ HoldReturns: +1                                  │ signal
//   odd: open; a signal to each thread                  │ pending = 0, then window read
//     │ all acknowledged                                │ odd:  acked = window, waits for its end
//   odd: quiet: recheck, swap                           │ even: returns (a late one)
//     │ CloseWindow: +1, all woken                      │
//   even                                         thread: running
//
// A signal that is on its way (pending) is not sent again; the order of the two stores and loads
// makes sure that a handler which saw the window closed is sent a new one.
//
// One thread at a time may open a window (Locks::address_space). The state is global, as a signal's
// handler is. In a forked child: ResetAfterFork.
#pragma once

#include <cstdint>

namespace unmoor::local {

inline constexpr uint32_t kThreadSlots = 1 << 16;  // a power of two
inline constexpr uint32_t kMaxThreads = kThreadSlots / 2;
// What glibc keeps to itself for setuid in all threads (SIGSETXID): no program can block it.
inline constexpr int kDefaultFreezeSignal = 33;

// Puts the handler in front of the one that is there, for good (one on its way may come late), and
// makes this the signal that is sent. 0 or -errno.
long InstallFreezeHandler(int signal);
int FreezeSignal();

// The thread that answers events takes no part in windows, nor does the one that opens a window:
// both allocate nothing meanwhile. All other threads do, the remapper's own as well.
void AddEventsThread();
void RemoveEventsThread();
void UnblockFreezeSignal();  // in the calling thread

struct WindowAttempt {
  bool open = false;
  int late_thread = 0;  // one that did not come
  uint32_t threads = 0;
  long error = 0;  // -errno: threads could not be listed or signalled
};

// `task_fd` is an open /proc/self/task throughout.
//
// Signals everybody and does not wait: from here to CloseWindow no thread leaves the kernel but
// into the handler. Threads asleep in the kernel stay there. 0 or -errno (EAGAIN: not now).
long HoldReturns(int task_fd);
// After HoldReturns: until everybody is in, within the limit. The window stays open either way.
WindowAttempt AwaitEverybody(int task_fd, int64_t limit_ns);
void CloseWindow();

// In an open window: true once every thread whose thread-local storage lies in [begin, end) is
// asleep. (The kernel writes the rseq area there as a thread is scheduled.) False after the limit.
bool LocalStorageIsQuiet(int task_fd, uint64_t begin, uint64_t end, int64_t limit_ns);

// Whether a stack, an alternate stack or thread-local storage of a thread lies in [begin, end), as
// it was when the thread was last in the handler. Threads never seen yet are made to come by
// first (the window need not be open). True also when that cannot be told.
bool HoldsThreadMemory(int task_fd, uint64_t begin, uint64_t end);
// How many threads have `signal` blocked; or -errno (EAGAIN: cannot be told for now).
long CountBlocking(int task_fd, int signal);

struct SleepingCall {
  uint64_t number;
  uint64_t args[6];
};
// Of the program, asleep or not. 0: cannot be told for now.
uint32_t CountThreads(int task_fd);
// Calls `visit` for each thread of the program that sleeps in a system call. What it waits for
// there may as well be a lock: unless it is the only thread, it can be back before `visit` is.
void ForEachSleeping(int task_fd, void (*visit)(void* context, const SleepingCall& call),
                     void* context);
// After HoldReturns: until each thread has come or been visited asleep, within the limit. True: no
// thread gets past the handler, whether visited or not. Else close the window and try again.
bool VisitUntilSettled(int task_fd, void (*visit)(void* context, const SleepingCall& call),
                       void* context, int64_t limit_ns);

void ResetAfterFork();
// For tests: fewer than kMaxThreads.
void LimitThreads(uint32_t most);

}  // namespace unmoor::local
