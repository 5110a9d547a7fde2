// The fault guard and fork, at the moments that a run meets too seldom: made on purpose.
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "fixture.h"
#include "remap/local/fault_guard.h"
#include "remap/local/watcher.h"
#include "remap/local/window.h"

namespace hazards {
namespace {

namespace local = unmoor::local;

char* OnePage() {
  void* at = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return static_cast<char*>(at);
}

TEST(Guard, ForkTakesNoPartInAWindow) {
  auto watcher = local::Watcher::Get(0);
  ASSERT_TRUE(watcher) << watcher.error().message();
  std::atomic<bool> open{true};
  std::atomic<bool> forked_inside{false};
  std::atomic<bool> ready{false};
  local::locks.window.Acquire();
  std::thread forker([&] {
    ready = true;
    const pid_t child = ::fork();
    if (child == 0) ::_exit(0);
    forked_inside = open.load();
    int status = 0;
    ::waitpid(child, &status, 0);
  });
  while (!ready) ::usleep(100);
  ::usleep(50'000);
  open = false;
  local::locks.window.Release();
  forker.join();
  EXPECT_FALSE(forked_inside);
}

bool IsReadOnly(const char* page) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    uint64_t begin = 0, end = 0;
    char protection[5] = {};
    if (std::sscanf(line.c_str(), "%lx-%lx %4s", &begin, &end, protection) != 3) continue;
    const auto at = reinterpret_cast<uint64_t>(page);
    if (begin <= at && at < end) return protection[1] == '-';
  }
  return false;
}

// A page under a guard of its own, for as long as it lives.
class GuardedPage {
 public:
  explicit GuardedPage(char* page) : page_(page), part_{Address(), Address() + kPage, 0} {
    local::locks.address_space.Acquire();
    EXPECT_GT(local::EnsureFaultHandler(), 0);
    local::RaiseGuard(part_.begin, part_.end, PROT_READ | PROT_WRITE, &part_, 1);
    ::mprotect(page, kPage, PROT_READ);
  }
  ~GuardedPage() {
    ::mprotect(page_, kPage, PROT_READ | PROT_WRITE);
    local::LowerGuard();
    local::locks.address_space.Release();
  }

 private:
  [[nodiscard]] uint64_t Address() const { return reinterpret_cast<uint64_t>(page_); }
  char* page_;
  local::Part part_;
};

// Until the thread sleeps in a futex. False: it does not.
bool SleepsInFutex(pid_t tid) {
  std::string call;
  for (int i = 0; call != "202" && i < 30'000; ++i) {
    ::usleep(1000);
    std::ifstream("/proc/" + std::to_string(tid) + "/syscall") >> call;
  }
  return call == "202";
}

// clone without fork's handlers, as some programs do.
TEST(Guard, AChildThatInheritedAGuardWrites) {
  auto watcher = local::Watcher::Get(0);
  ASSERT_TRUE(watcher) << watcher.error().message();
  char* page = OnePage();
  pid_t child = 0;
  {
    const GuardedPage guard(page);
    child = static_cast<pid_t>(::syscall(SYS_fork));
    if (child == 0) {
      *static_cast<volatile char*>(page) = 1;
      ::syscall(SYS_exit_group, page[0] == 1 ? 0 : 1);  // past locks it may have found held
    }
  }
  int status = 0;
  for (int i = 0; i < 20'000 && ::waitpid(child, &status, WNOHANG) == 0; ++i) ::usleep(1000);
  if (::kill(child, SIGKILL) == 0) ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  ::munmap(page, kPage);
}

// Not instrumented: it runs with its parent's thread-local storage, where ThreadSanitizer keeps
// what it knows of one thread.
__attribute__((no_sanitize("thread"))) int WriteOne(void* page) {
  *static_cast<volatile char*>(page) = 1;
  return 0;
}

// As vfork and posix_spawn make them: to lift the guard would lift it for the program.
TEST(Guard, AChildThatSharesOurMemoryWaits) {
  auto watcher = local::Watcher::Get(0);
  ASSERT_TRUE(watcher) << watcher.error().message();
  char* page = OnePage();
  std::vector<char> stack(1 << 16);
  pid_t child = 0;
  {
    const GuardedPage guard(page);
    child = ::clone(WriteOne, stack.data() + stack.size(), CLONE_VM | SIGCHLD, page);
    ASSERT_GT(child, 0);
    EXPECT_TRUE(SleepsInFutex(child));
    EXPECT_TRUE(IsReadOnly(page));
    EXPECT_EQ(page[0], 0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(page[0], 1);
  ::munmap(page, kPage);
}

// Where a handler runs SIGSEGV is blocked: a guarded page would be its end.
TEST(Guard, AHandlerOfTheProgramsMayWriteAnywhere) {
  EXPECT_TRUE(InChild([] {
    auto watcher = local::Watcher::Get(0);
    if (!watcher) return false;
    static char *page, *own;
    page = OnePage();
    own = OnePage();
    ::mprotect(own, kPage, PROT_READ);
    struct sigaction action{};
    action.sa_flags = SA_SIGINFO;
    action.sa_sigaction = [](int, siginfo_t*, void*) {
      *static_cast<volatile char*>(page) = 1;
      ::mprotect(own, kPage, PROT_READ | PROT_WRITE);
    };
    ::sigaction(SIGSEGV, &action, nullptr);
    std::atomic<pid_t> tid{0};
    std::thread thread;
    bool waits = false;
    {
      const GuardedPage guard(page);
      thread = std::thread([&] {
        tid = ::gettid();
        *static_cast<volatile char*>(own) = 1;
      });
      while (tid == 0) ::usleep(100);
      waits = SleepsInFutex(tid);
    }
    thread.join();
    return waits && page[0] == 1 && own[0] == 1;
  }));
}

// A fork copies the handlers first: with the handler installed and a guard raised in between, the
// child would have the guard and no handler. vfork stands for it, since it takes as long as we
// like.
class InFork : public Hazard {};
TEST_F(InFork, AThreadThereIsWaitedForBeforeTheFirstGuard) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer makes a fork of every vfork, which does not hold its thread";
#endif
  MakeImage(4 * kMiB);
  EXPECT_TRUE(InChild([&] {
    ThreadInVfork forker;
    Map();
    if (!Start().Wait(kLimit).ok()) return false;  // the thread is known from here on
    Map();
    forker.Enter();
    auto remapper = Start(unmoor::Guard::kFault, false);
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    const bool waited = remapper.progress().done_bytes == 0;
    forker.Leave();
    while (remapper.Wait(kLimit).code() == unmoor::StatusCode::kBusy) remapper.Resume();
    return waited && remapper.progress().status == unmoor::RemapStatus::kReady;
  }));
}

struct sigaction ours;
char* late_page;

// The guard goes between the fault and our handler's look at it: here, by a handler in front.
TEST(Guard, AFaultThatComesLateIsTriedAgain) {
  EXPECT_TRUE(InChild([] {
    auto watcher = local::Watcher::Get(0);
    if (!watcher) return false;
    late_page = OnePage();
    if (local::EnsureFaultHandler() < 0) return false;
    struct sigaction front{};
    front.sa_flags = SA_SIGINFO;
    front.sa_sigaction = [](int signal, siginfo_t* info, void* context) {
      ::mprotect(late_page, kPage, PROT_READ | PROT_WRITE);
      ours.sa_sigaction(signal, info, context);
    };
    ::sigaction(SIGSEGV, &front, &ours);
    for (char i = 1; i <= 2; ++i) {  // twice: nothing is used up by the first
      ::mprotect(late_page, kPage, PROT_READ);
      *static_cast<volatile char*>(late_page) = i;
    }
    return late_page[0] == 2;
  }));
}

}  // namespace
}  // namespace hazards
