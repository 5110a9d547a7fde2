// Threads whose own memory (stack, thread-local storage, rseq area, robust list, signal stack) is
// being remapped, threads that block signals, and fork.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>
#include <thread>
#include <vector>

#include "fixture.h"

namespace hazards {
namespace {

using unmoor::Guard;

class Threads : public Hazard {
 protected:
  void SetUp() override {
    Hazard::SetUp();
    MakeImage(6 * kMiB);
  }
};

constexpr int kRounds = 12;

thread_local uint64_t local_word = 0;

struct OnStack {
  const std::atomic<bool>* over;
  std::atomic<bool> failed{false};
  std::atomic<uint64_t> signals{0};
};

// Lives on its stack and in its thread-local storage alone.
void* LiveOnStack(void* argument) {
  auto& state = *static_cast<OnStack*>(argument);
  uint64_t words[512] = {};
  for (uint64_t i = 1; !*state.over; ++i) {
    volatile uint64_t* word = &words[i % 512];
    *word = i;
    volatile uint64_t* local = &local_word;
    *local = i;
    if (i % 1000 == 0) ::sched_yield();
    if (*word != i || *local != i || ::sched_getcpu() < 0) {
      state.failed = true;
      break;
    }
  }
  return nullptr;
}

pthread_t ThreadOn(char* stack, size_t size, void* (*body)(void*), void* argument) {
  pthread_attr_t attributes;
  ::pthread_attr_init(&attributes);
  EXPECT_EQ(::pthread_attr_setstack(&attributes, stack, size), 0);
  pthread_t thread{};
  EXPECT_EQ(::pthread_create(&thread, &attributes, body, argument), 0);
  return thread;
}

// kFault with the promise that no system call writes there: the engine has to find the stack
// itself.
TEST_F(Threads, StacksAndThreadLocalStorageAreRemappedUnderTheirThreads) {
  for (const Guard guard : {Guard::kFreeze, Guard::kFault}) {
    const auto body = [&](char* memory, const std::atomic<bool>& over) {
      OnStack state{&over};
      const pthread_t thread = ThreadOn(memory + 2 * kMiB, kMiB, LiveOnStack, &state);
      EXPECT_EQ(::pthread_join(thread, nullptr), 0);
      EXPECT_FALSE(state.failed);
    };
    DuringRemap(3 * kRounds, body, guard, guard == Guard::kFreeze);
  }
}

// The kernel clears the thread's id in its descriptor, and wakes the joiner, as it ends.
TEST_F(Threads, EndsAreSeenByPthreadJoin) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    for (size_t i = 0; !over || i < 8; ++i) {
      char* stack = memory + i % 5 * kMiB;
      const pthread_t thread = ThreadOn(stack, kMiB, [](void* p) { return p; }, stack);
      void* result = nullptr;
      ASSERT_EQ(::pthread_join(thread, &result), 0);
      ASSERT_EQ(result, stack);
    }
  };
  DuringRemap(kRounds, body);
}

std::atomic<uint64_t> handled{0};

void SignalBombardment(Hazard& /*test*/, char* memory, const std::atomic<bool>& over,
                       bool onstack) {
  struct sigaction action{};
  action.sa_handler = [](int) {
    volatile char frame[2000];
    for (size_t i = 0; i < sizeof(frame); i += 100) frame[i] = static_cast<char>(i);
    ++handled;
  };
  action.sa_flags = SA_RESTART | (onstack ? SA_ONSTACK : 0);
  struct sigaction before{};
  ASSERT_EQ(::sigaction(SIGUSR1, &action, &before), 0);
  struct State {
    OnStack on_stack;
    char* alternate;
  } state{{&over}, memory + 4 * kMiB};
  const auto live = [](void* argument) -> void* {
    auto& own = *static_cast<State*>(argument);
    const stack_t stack{own.alternate, 0, 65536};
    ::sigaltstack(&stack, nullptr);
    LiveOnStack(&own.on_stack);
    const stack_t none{nullptr, SS_DISABLE, 0};
    ::sigaltstack(&none, nullptr);
    return nullptr;
  };
  const pthread_t thread = ThreadOn(memory + 2 * kMiB, kMiB, live, &state);
  const uint64_t handled_before = handled;
  uint64_t sent = 0;
  while (!over) {
    if (sent - (handled - handled_before) < 100 && ::pthread_kill(thread, SIGUSR1) == 0) ++sent;
  }
  EXPECT_EQ(::pthread_join(thread, nullptr), 0);
  EXPECT_FALSE(state.on_stack.failed);
  ::sigaction(SIGUSR1, &before, nullptr);
}

TEST_F(Threads, SignalsArriveOnAStackBeingRemapped) {
  for (const bool onstack : {false, true}) {
    const auto body = [&](char* memory, const std::atomic<bool>& over) {
      SignalBombardment(*this, memory, over, onstack);
    };
    DuringRemap(kRounds / 2, body, Guard::kFreeze);
    DuringRemap(kRounds / 2, body, Guard::kFault, false);
  }
}

void WriteEverywhere(char* memory, size_t size, const std::atomic<bool>& over) {
  std::vector<uint64_t> last(size / kPage);
  for (uint64_t n = 1; !over || n < 100; ++n) {
    const size_t page = n * 7919 % last.size();
    auto* word = reinterpret_cast<volatile uint64_t*>(memory + page * kPage + 64);
    const uint64_t expected = last[page] != 0 ? last[page] : PatternAt(page * kPage + 64);
    ASSERT_EQ(*word, expected);
    *word = last[page] = n;
  }
  for (size_t page = 0; page < last.size(); ++page) {
    const uint64_t expected = last[page] != 0 ? last[page] : PatternAt(page * kPage + 64);
    ASSERT_EQ(*reinterpret_cast<volatile uint64_t*>(memory + page * kPage + 64), expected);
  }
}

TEST_F(Threads, WritingWithoutPauseLoseNothing) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    WriteEverywhere(memory, size(), over);
  };
  DuringRemap(kRounds, body, Guard::kFreeze);
  DuringRemap(kRounds, body, Guard::kFault, false);
}

TEST_F(Threads, BlockingSigsegvDoesNotKillAWriter) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    sigset_t fault;
    sigemptyset(&fault);
    sigaddset(&fault, SIGSEGV);
    ::pthread_sigmask(SIG_BLOCK, &fault, nullptr);
    WriteEverywhere(memory, size(), over);
  };
  DuringRemap(kRounds, body, Guard::kFault, false);
}

TEST_F(Threads, BlockingEverySignalDoesNotStopTheRemap) {
  const auto body = [&](char* memory, const std::atomic<bool>& over) {
    sigset_t all;
    sigfillset(&all);
    ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
    WriteEverywhere(memory, size(), over);
  };
  DuringRemap(kRounds, body, Guard::kFreeze);
  DuringRemap(kRounds, body, Guard::kFault, false);
}

// With a signal of the caller's choice a thread may block it: then the remap stands, and says who.
TEST_F(Threads, OneThatBlocksTheFreezeSignalIsNamed) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer's own thread blocks every signal but the C library's";
#endif
  ASSERT_TRUE(InChild([&] {
    Map();
    std::atomic<bool> over{false};
    std::atomic<pid_t> tid{0};
    std::thread blocker([&] {
      sigset_t all;
      sigfillset(&all);
      ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
      tid = ::gettid();
      while (!over) ::usleep(1000);
    });
    while (tid == 0) ::usleep(100);
    unmoor::RemapOptions options;
    options.freeze_signal = SIGRTMIN + 3;
    bool right = false;
    {
      auto remapper = Start(Guard::kFreeze, true, options);
      const auto status = remapper.Wait(std::chrono::seconds(30));
      right = status.code() == unmoor::StatusCode::kBusy &&
              status.message().find(std::to_string(tid)) != std::string::npos;
      over = true;
      blocker.join();
      remapper.Resume();
      right = right && remapper.Wait(kLimit).ok();
    }
    return right;
  }));
}

// A child of a bare fork has whatever locks were held, ThreadSanitizer's too: it ends past them.
[[noreturn]] void EndBareChild(int code) {
  ::syscall(SYS_exit_group, code);
  __builtin_unreachable();
}

// Through the C library and past it.
TEST_F(Threads, AForkedChildHasRightAndWritableMemory) {
  for (const Guard guard : {Guard::kFreeze, Guard::kFault}) {
    const auto body = [&](char* memory, const std::atomic<bool>& over) {
      for (int i = 0; !over || i < 4; ++i) {
        const auto child = i % 2 == 0 ? ::fork() : static_cast<pid_t>(::syscall(SYS_fork));
        if (child == 0) {
          ::alarm(30);
          for (size_t at = 0; at < size(); at += kPage) {
            auto* word = reinterpret_cast<volatile uint64_t*>(memory + at);
            if (*word != PatternAt(at)) EndBareChild(2);
            *word = at;
            if (*word != at) EndBareChild(3);
          }
          EndBareChild(0);
        }
        int status = 0;
        ASSERT_EQ(::waitpid(child, &status, 0), child);
        ASSERT_EQ(status, 0);
      }
    };
    DuringRemap(kRounds, body, guard, guard == Guard::kFreeze);
  }
}

TEST_F(Threads, AForkedChildMayStartARemapperOfItsOwn) {
  Map();
  auto remapper = Start();
  remapper.Pause();
  EXPECT_TRUE(InChild([&] {
    const auto seen = remapper.progress();
    if (seen.status != unmoor::RemapStatus::kLater || seen.reason.empty()) return false;
#if defined(__SANITIZE_THREAD__)
    // It takes the parent's threads for the child's, and a new one on the stack of one of those, as
    // the C library starts it, for a contradiction ("dup thread with used id").
    return true;
#endif
    const unmoor::RemapRange range{{memory(), size()}};
    auto own = unmoor::BackgroundRemapper::Start(std::span(&range, 1));
    if (!own.ok() || !own->Wait(kLimit).ok()) return false;
    ExpectPattern(0, size());
    return !HasFailure();
  }));
  remapper.Resume();
  EXPECT_TRUE(remapper.Wait(kLimit).ok());
  ExpectPattern(0, size());
}

}  // namespace
}  // namespace hazards
