// Threads held, by a process that traces them, at the moments that a run meets too seldom, and
// threads with hardly a stack.
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <ctime>
#include <thread>

#include "fixture.h"

namespace hazards {
namespace {

using unmoor::Guard;

// A process that holds one thread of ours, once, at a moment of our choice.
class Holder {
 public:
  enum Moment {
    kInRendezvous,  // it has come, and does not sleep yet
    kAtItsEnd       // the kernel has yet to write what it writes as a thread ends
  };
  Holder(pid_t tid, Moment moment)
      : shared_(static_cast<Shared*>(
            ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {
    ::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    process_ = ::fork();
    if (process_ == 0) ::_exit(Trace(tid, moment));
    while (shared_->stage == kBegins) ::usleep(100);
  }
  Holder(const Holder&) = delete;
  Holder& operator=(const Holder&) = delete;
  ~Holder() {
    Release();
    ::waitpid(process_, nullptr, 0);
    ::munmap(shared_, kPage);
  }
  [[nodiscard]] bool MayTrace() const { return shared_->stage != kFailed; }
  // False: it has not come to that in a long time.
  [[nodiscard]] bool Holds() const {
    for (int i = 0; i < 60'000 && shared_->stage != kHeld; ++i) ::usleep(1000);
    return shared_->stage == kHeld;
  }
  void Release() { shared_->release = true; }

 private:
  enum Stage { kBegins, kTraces, kHeld, kFailed };
  struct Shared {
    std::atomic<int> stage;
    std::atomic<bool> release;
  };

  int Trace(pid_t tid, Moment moment) {
    constexpr long kOptions = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXIT;
    const bool seized = ::ptrace(PTRACE_SEIZE, tid, nullptr, kOptions) == 0;
    shared_->stage = seized ? kTraces : kFailed;
    bool in_handler = false;
    for (int status = 0; seized && ::waitpid(tid, &status, __WALL) == tid;) {
      if (!WIFSTOPPED(status)) return 0;
      const int signal = WSTOPSIG(status);
      const bool call = signal == (SIGTRAP | 0x80);
      const bool ends = status >> 8 == (SIGTRAP | PTRACE_EVENT_EXIT << 8);
      if (moment == kInRendezvous ? call && EntersFutex(tid) : ends) {
        shared_->stage = kHeld;
        while (!shared_->release) ::usleep(100);
        ::ptrace(PTRACE_DETACH, tid, nullptr, nullptr);
        return 0;
      }
      in_handler = in_handler || signal == kFreezeSignal;
      ::ptrace(in_handler ? PTRACE_SYSCALL : PTRACE_CONT, tid, nullptr,
               call || status >> 16 != 0 ? 0 : static_cast<long>(signal));
    }
    return 0;
  }
  static bool EntersFutex(pid_t tid) {
    __ptrace_syscall_info call{};
    ::ptrace(PTRACE_GET_SYSCALL_INFO, tid, sizeof(call), &call);
    return call.op == PTRACE_SYSCALL_INFO_ENTRY && call.entry.nr == SYS_futex;
  }

  static constexpr int kFreezeSignal = 33;
  Shared* shared_;
  pid_t process_ = 0;
};

class HeldThreads : public Hazard {
 protected:
  void SetUp() override {
    Hazard::SetUp();
    MakeImage(6 * kMiB);
  }

  // Its stack, and its thread-local storage, lie in the direct-mapped memory.
  static pthread_t ThreadOn(char* stack, void* (*body)(void*), void* argument) {
    pthread_attr_t attributes;
    ::pthread_attr_init(&attributes);
    EXPECT_EQ(::pthread_attr_setstack(&attributes, stack, kMiB), 0);
    pthread_t thread{};
    EXPECT_EQ(::pthread_create(&thread, &attributes, body, argument), 0);
    return thread;
  }
  static void ExpectNothingIsSwapped(const unmoor::BackgroundRemapper& remapper) {
    for (int i = 0; i < 200; ++i) {
      ASSERT_EQ(remapper.progress().done_bytes, 0U);
      ::usleep(1000);
    }
  }
  static void ExpectEnds(unmoor::BackgroundRemapper& remapper) {
    while (remapper.Wait(kLimit).code() == unmoor::StatusCode::kBusy) remapper.Resume();
    EXPECT_EQ(remapper.progress().status, unmoor::RemapStatus::kReady);
  }
};

// On its way from the acknowledgement to its sleep the kernel may put it on another processor, and
// writes that into its rseq area.
TEST_F(HeldThreads, OnesWhoseStorageMovesAreAsleepBeforeItDoes) {
  Map();
  struct {
    std::atomic<pid_t> tid{0};
    std::atomic<bool> over{false};
  } state;
  const auto body = [](void* argument) -> void* {
    auto& own = *static_cast<decltype(state)*>(argument);
    own.tid = ::gettid();
    while (!own.over) ::usleep(100);
    return nullptr;
  };
  const pthread_t thread = ThreadOn(memory() + 2 * kMiB, body, &state);
  while (state.tid == 0) ::usleep(100);
  {
    Holder holder(state.tid, Holder::kInRendezvous);
    if (!holder.MayTrace()) {
      state.over = true;
      ::pthread_join(thread, nullptr);
      GTEST_SKIP() << "this process may not be traced";
    }
    unmoor::RemapOptions options;
    options.max_pause = std::chrono::milliseconds(400);  // it is in time, although it is traced
    auto remapper = Start(Guard::kFreeze, true, options);
    EXPECT_TRUE(holder.Holds());
    ExpectNothingIsSwapped(remapper);
    holder.Release();
    ExpectEnds(remapper);
  }
  state.over = true;
  EXPECT_EQ(::pthread_join(thread, nullptr), 0);
}

// The kernel marks the robust locks it held, clears its id and wakes who waits for that.
TEST_F(HeldThreads, OnesOnTheirWayOutAreWaitedFor) {
  for (const Guard guard : {Guard::kFreeze, Guard::kFault}) {
    Map();
    struct {
      pthread_mutex_t* mutex;
      std::atomic<pid_t> tid{0};
      std::atomic<bool> over{false};
    } state{reinterpret_cast<pthread_mutex_t*>(memory() + kMiB)};
    pthread_mutexattr_t attributes;
    ::pthread_mutexattr_init(&attributes);
    ::pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    ASSERT_EQ(::pthread_mutex_init(state.mutex, &attributes), 0);
    const auto body = [](void* argument) -> void* {
      auto& own = *static_cast<decltype(state)*>(argument);
      ::pthread_mutex_lock(own.mutex);
      own.tid = ::gettid();
      while (!own.over) ::usleep(100);
      return nullptr;
    };
    const pthread_t thread = ThreadOn(memory() + 3 * kMiB, body, &state);
    while (state.tid == 0) ::usleep(100);
    Holder holder(state.tid, Holder::kAtItsEnd);
    state.over = true;
    if (!holder.MayTrace()) {
      ::pthread_join(thread, nullptr);
      GTEST_SKIP() << "this process may not be traced";
    }
    EXPECT_TRUE(holder.Holds());
    auto remapper = Start(guard);
    ExpectNothingIsSwapped(remapper);
    holder.Release();
    ExpectEnds(remapper);
    timespec until{};
    ::clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 20;
    EXPECT_EQ(::pthread_timedjoin_np(thread, nullptr, &until), 0);
    ASSERT_EQ(::pthread_mutex_trylock(state.mutex), EOWNERDEAD);
    EXPECT_EQ(::pthread_mutex_consistent(state.mutex), 0);
    EXPECT_EQ(::pthread_mutex_unlock(state.mutex), 0);
    Unmap();
  }
}

// As runtimes with stacks of their own do it: no signal's frame fits there, and one without
// SA_ONSTACK is the end.
TEST_F(HeldThreads, OnesWithHardlyAStackTakeSignalsOnTheirAlternateOne) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    auto* guard = static_cast<char*>(
        ::mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    ASSERT_EQ(::mprotect(guard, kPage, PROT_NONE), 0);
    static char alternate[1 << 16];
    const stack_t stack{alternate, 0, sizeof(alternate)};
    ASSERT_EQ(::sigaltstack(&stack, nullptr), 0);
    uint64_t at = 0;
    // Stores to one page after the other, without a call, until it is over.
    asm volatile(
        "movq %%rsp, %%rbx\n"
        "movq %[low], %%rsp\n"
        "1: movq %[at], (%[memory], %[at])\n"
        "addq %[page], %[at]\n"
        "cmpq %[size], %[at]\n"
        "jb 2f\n"
        "xorl %k[at], %k[at]\n"
        "2: cmpb $0, (%[over])\n"
        "je 1b\n"
        "movq %%rbx, %%rsp\n"
        : [at] "+r"(at)
        : [low] "r"(guard + kPage + 512), [memory] "r"(memory), [page] "r"(kPage),
          [size] "r"(size()), [over] "r"(&over)
        : "rbx", "memory", "cc");
    const stack_t none{nullptr, SS_DISABLE, 0};
    ::sigaltstack(&none, nullptr);
    ::munmap(guard, 2 * kPage);
  };
  static_assert(sizeof(std::atomic<bool>) == 1);
  EXPECT_TRUE(InChild([&] {
    DuringRemap(12, body, Guard::kFreeze);
    DuringRemap(12, body, Guard::kFault, false);
    return !HasFailure();
  }));
}

}  // namespace
}  // namespace hazards
