// The program's own SIGSEGV handlers, before and after ours, while kFault guards its memory.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <thread>

#include "fixture.h"
#include "unmoor/dirty_tracker.h"

namespace hazards {
namespace {

using unmoor::Guard;

sigjmp_buf back;
std::atomic<void*> fault_address{nullptr};
std::atomic<int> faults{0};
std::atomic<bool> on_alternate{false};
std::atomic<bool> sees_mask{false};
std::atomic<bool> sees_own_blocked{false};

// ThreadSanitizer's own handler stands in for every other, with all signals blocked; its own thread
// has SIGSEGV blocked, so that each block is frozen for.
#if defined(__SANITIZE_THREAD__)
constexpr bool kMasksAreKept = false;
constexpr bool kGuardsAreRaised = false;
#define SKIP_WHERE_HANDLERS_ARE_STOOD_IN_FOR()                                             \
  GTEST_SKIP()                                                                             \
      << "ThreadSanitizer has one handler a signal, which stands for the last one alone: " \
         "what that replaced cannot be called any more"
#else
constexpr bool kMasksAreKept = true;
constexpr bool kGuardsAreRaised = true;
#define SKIP_WHERE_HANDLERS_ARE_STOOD_IN_FOR() static_cast<void>(0)
#endif

void OwnHandler(int signal, siginfo_t* info, void* context) {
  ++faults;
  fault_address = info->si_addr;
  stack_t stack{};
  ::sigaltstack(nullptr, &stack);
  on_alternate = (stack.ss_flags & SS_ONSTACK) != 0;
  sigset_t mask;
  ::pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  sees_own_blocked = sigismember(&mask, signal) == 1;
  sees_mask = sigismember(&mask, SIGUSR2) == 1 &&
              (sigismember(&mask, SIGUSR1) == 0 || !kMasksAreKept) && context != nullptr;
  siglongjmp(back, 1);
}

void Install(int flags, int signal = SIGSEGV) {
  struct sigaction action{};
  action.sa_sigaction = OwnHandler;
  action.sa_flags = SA_SIGINFO | flags;
  sigaddset(&action.sa_mask, SIGUSR2);
  ::sigaction(signal, &action, nullptr);
}

// A fault of the program's own. True when its handler got it as it should.
bool FaultOnPurpose(void* at, bool alternate, bool own_blocked = true) {
  const int before = faults;
  if (sigsetjmp(back, 1) == 0) *static_cast<volatile char*>(at) = 1;
  return faults == before + 1 && fault_address == at && on_alternate == alternate && sees_mask &&
         sees_own_blocked == (own_blocked || !kMasksAreKept);
}

// A page behind the end of its file: SIGBUS.
void* BehindTheEnd() {
  const int file = ::memfd_create("empty", MFD_CLOEXEC);
  void* at = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  ::close(file);
  return at;
}

class OwnHandlers : public Hazard {
 protected:
  void SetUp() override {
    Hazard::SetUp();
    MakeImage(8 * kMiB);
  }

  // In a child: own faults on a page of its own, and writes under the guard, while remapping.
  bool FaultsAndWrites(const std::function<void()>& before, const std::function<void()>& during,
                       bool alternate, bool own_blocked = true, void* own = nullptr) {
    if (own == nullptr) {
      own = ::mmap(nullptr, kPage, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    static char stack_memory[65536];
    const stack_t stack{stack_memory, 0, sizeof(stack_memory)};
    ::sigaltstack(&stack, nullptr);
    before();
    uint64_t caught = 0;
    for (int round = 0; round < 20 || (kGuardsAreRaised && caught == 0 && round < 200); ++round) {
      Map();
      std::atomic<bool> over{false};
      std::thread writer([&] {
        for (size_t i = 0; !over; i += kPage) memory()[i % size()] = 1;
      });
      auto remapper = Start(Guard::kFault, false);
      during();
      bool right = true;
      while (remapper.Wait(std::chrono::nanoseconds(0)).code() == unmoor::StatusCode::kTimedOut) {
        right = right && FaultOnPurpose(own, alternate, own_blocked);
      }
      right = right && FaultOnPurpose(own, alternate, own_blocked);
      caught += remapper.progress().faults_caught;
      over = true;
      writer.join();
      if (!right || !remapper.Wait(kLimit).ok()) return false;
    }
    return caught > 0 || !kGuardsAreRaised;
  }
};

TEST_F(OwnHandlers, InstalledBeforeGetTheirFaults) {
  EXPECT_TRUE(InChild([&] { return FaultsAndWrites([] { Install(0); }, [] {}, false); }));
}

TEST_F(OwnHandlers, InstalledBeforeWithAnAlternateStackGetTheirFaultsThere) {
  EXPECT_TRUE(InChild([&] { return FaultsAndWrites([] { Install(SA_ONSTACK); }, [] {}, true); }));
}

TEST_F(OwnHandlers, InstalledAfterOursGetTheirFaults) {
  EXPECT_TRUE(InChild([&] {
    return FaultsAndWrites([] { Install(SA_ONSTACK); }, [] { Install(SA_ONSTACK); }, true);
  }));
}

TEST_F(OwnHandlers, ThatLeaveTheirSignalOpenFindItOpen) {
  EXPECT_TRUE(
      InChild([&] { return FaultsAndWrites([] { Install(SA_NODEFER); }, [] {}, false, false); }));
}

TEST_F(OwnHandlers, OfBusErrorsGetThemWhileMemoryIsGuarded) {
  EXPECT_TRUE(InChild([&] {
    return FaultsAndWrites([] { Install(SA_ONSTACK, SIGBUS); }, [] {}, true, true, BehindTheEnd());
  }));
}

struct sigaction replaced;

// Keeps ours in front when a remap is over: it stays as long as anything of the process is watched.
unmoor::DirtyTracker Keeper() {
  const unmoor::MemoryRange range{
      ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), kPage};
  auto tracker = unmoor::DirtyTracker::Start(std::span(&range, 1));
  EXPECT_TRUE(tracker.ok());
  return std::move(*tracker);
}

// The usual way of chaining: what is not its own goes to the handler it replaced, which is ours.
TEST_F(OwnHandlers, ThatCallTheOneTheyReplacedDoNotGoInCircles) {
  SKIP_WHERE_HANDLERS_ARE_STOOD_IN_FOR();
  EXPECT_TRUE(InChild([&] {
    const auto keeper = Keeper();
    Install(0);
    Map();
    if (!Start(Guard::kFault, false).Wait(kLimit).ok()) return false;
    struct sigaction action{};
    action.sa_sigaction = [](int signal, siginfo_t* info, void* context) {
      if ((replaced.sa_flags & SA_SIGINFO) != 0) replaced.sa_sigaction(signal, info, context);
    };
    action.sa_flags = SA_SIGINFO;
    sigaddset(&action.sa_mask, SIGUSR2);
    ::sigaction(SIGSEGV, &action, &replaced);
    Map();
    if (!Start(Guard::kFault, false).Wait(kLimit).ok()) return false;
    void* own = ::mmap(nullptr, kPage, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return FaultOnPurpose(own, false) && FaultOnPurpose(own, false);
  }));
}

// In front of ours, calling ours, when nothing is remapped any more: the fault goes on to the
// handler that ours was put in front of.
TEST_F(OwnHandlers, ThatCallOursAfterItWasLetGoReachTheOneBefore) {
  SKIP_WHERE_HANDLERS_ARE_STOOD_IN_FOR();
  EXPECT_TRUE(InChild([&] {
    Install(0);
    Map();
    struct sigaction action{};
    action.sa_sigaction = [](int signal, siginfo_t* info, void* context) {
      replaced.sa_sigaction(signal, info, context);
    };
    action.sa_flags = SA_SIGINFO;
    sigaddset(&action.sa_mask, SIGUSR2);
    {
      const auto keeper = Keeper();
      if (!Start(Guard::kFault, false).Wait(kLimit).ok()) return false;
      ::sigaction(SIGSEGV, &action, &replaced);
    }
    if ((replaced.sa_flags & SA_SIGINFO) == 0 || replaced.sa_sigaction == OwnHandler) return false;
    void* own = ::mmap(nullptr, kPage, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return FaultOnPurpose(own, false) && FaultOnPurpose(own, false);
  }));
}

// In front, found and left behind again: what calls ours then is known, and what it replaced is
// next, not itself once more.
TEST_F(OwnHandlers, ThatOursStoodInFrontOfAreCalledOnce) {
  SKIP_WHERE_HANDLERS_ARE_STOOD_IN_FOR();
  EXPECT_TRUE(InChild([&] {
    Install(0);
    Map();
    static std::atomic<int> calls{0};
    struct sigaction action{};
    action.sa_sigaction = [](int signal, siginfo_t* info, void* context) {
      ++calls;
      replaced.sa_sigaction(signal, info, context);
    };
    action.sa_flags = SA_SIGINFO;
    sigaddset(&action.sa_mask, SIGUSR2);
    {
      const auto keeper = Keeper();
      if (!Start(Guard::kFault, false).Wait(kLimit).ok()) return false;
      ::sigaction(SIGSEGV, &action, &replaced);
      Map();
      if (!Start(Guard::kFault, false).Wait(kLimit).ok()) return false;
    }
    void* own = ::mmap(nullptr, kPage, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return FaultOnPurpose(own, false) && calls == 1;
  }));
}

// A SIGSEGV that is sent is ignored as it was meant to be; one that the program's own access made
// is the end, whatever was said of it.
TEST_F(OwnHandlers, IgnoredSignalsStayIgnoredAndFaultsFatal) {
  SKIP_WHERE_HANDLERS_ARE_STOOD_IN_FOR();
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGSEGV, SIG_IGN);
    const auto keeper = Keeper();
    Map();
    if (!Start(Guard::kFault, false).Wait(kLimit).ok()) ::_exit(7);
    for (int i = 0; i < 100; ++i) ::kill(::getpid(), SIGSEGV);
    struct sigaction now{};
    ::sigaction(SIGSEGV, nullptr, &now);
    if (now.sa_handler == SIG_IGN) ::_exit(8);  // ours is not in front: nothing was tried
    void* own = ::mmap(nullptr, kPage, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *static_cast<volatile char*>(own) = 1;
    ::_exit(9);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV) << status;
}

// SA_RESETHAND: the first fault of its own, not one of the guard's, uses the handler up.
TEST_F(OwnHandlers, MeantForOneFaultGetOne) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    const auto keeper = Keeper();
    Install(SA_RESETHAND);
    Map();
    std::atomic<bool> over{false};
    std::thread writer([&] {
      for (size_t i = 0; !over; i += kPage) memory()[i % size()] = 1;
    });
    if (!Start(Guard::kFault, false).Wait(kLimit).ok()) ::_exit(7);
    over = true;
    writer.join();
    void* own = ::mmap(nullptr, kPage, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!FaultOnPurpose(own, false)) ::_exit(8);
    (void)FaultOnPurpose(own, false);
    ::_exit(9);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  // The second fault on purpose finds the default action.
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV) << status;
}

}  // namespace
}  // namespace hazards
