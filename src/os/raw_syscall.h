// Freestanding. System calls without a C library: no errno, no interception by sanitizers or by the
// program, nothing allocated, nothing locked. For code that runs in a signal handler, or while
// other threads of the process are stopped with whatever locks they hold.
//
// Each returns what the kernel returns: a result, or -errno.
#pragma once

#include <asm/unistd.h>

#include <cstdint>

namespace unmoor::raw {

inline long Call(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0,
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

inline constexpr long kEintr = 4, kEagain = 11, kEfault = 14, kEbusy = 16, kEsrch = 3;

inline int64_t Now() {
  int64_t time[2] = {};
  Call(__NR_clock_gettime, 1 /*CLOCK_MONOTONIC*/, Address(time));
  return time[0] * 1'000'000'000 + time[1];
}

inline void Sleep(int64_t nanos) {
  const int64_t time[2] = {nanos / 1'000'000'000, nanos % 1'000'000'000};
  Call(__NR_nanosleep, Address(time), 0);
}

// Returns when woken, when `word` is not `seen`, or after the limit (negative: none); look again.
inline void FutexWait(const uint32_t* word, uint32_t seen, int64_t limit_ns = -1) {
  const int64_t time[2] = {limit_ns / 1'000'000'000, limit_ns % 1'000'000'000};
  Call(__NR_futex, Address(word), 128 /*WAIT_PRIVATE*/, static_cast<long>(seen),
       limit_ns < 0 ? 0 : Address(time));
}

inline void FutexWake(const uint32_t* word, int count) {
  Call(__NR_futex, Address(word), 129 /*WAKE_PRIVATE*/, count);
}

inline bool Readable(int fd) {
  struct {
    int fd;
    short events;
    short revents;
  } poll = {fd, 1 /*POLLIN*/, 0};
  const int64_t none[2] = {0, 0};
  return Call(__NR_ppoll, Address(&poll), 1, Address(none), 0, 8) > 0;
}

inline int ThreadId() {
  return static_cast<int>(Call(__NR_gettid));
}

inline int ProcessId() {
  return static_cast<int>(Call(__NR_getpid));
}

// A mutex for code that may not allocate and must be resettable in a forked child. 0 free, 1 held,
// 2 held and waited for.
class Lock {
 public:
  void Acquire() {
    uint32_t free = 0;
    if (__atomic_compare_exchange_n(&word_, &free, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
      return;
    }
    while (__atomic_exchange_n(&word_, 2, __ATOMIC_ACQUIRE) != 0) FutexWait(&word_, 2);
  }
  void Release() {
    if (__atomic_exchange_n(&word_, 0, __ATOMIC_RELEASE) == 2) FutexWake(&word_, 1);
  }
  void Reset() { __atomic_store_n(&word_, 0, __ATOMIC_RELEASE); }

 private:
  uint32_t word_ = 0;
};

}  // namespace unmoor::raw
