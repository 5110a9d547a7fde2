// The fault guard and fork, at the moments that a run meets too seldom: made on purpose.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

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

// clone without fork's handlers, as some programs do.
TEST(Guard, AChildThatInheritedAGuardWrites) {
  auto watcher = local::Watcher::Get(0);
  ASSERT_TRUE(watcher) << watcher.error().message();
  char* page = OnePage();
  local::locks.address_space.Acquire();
  ASSERT_EQ(local::EnsureFaultHandler((*watcher)->fds().maps), 0);
  const auto begin = reinterpret_cast<uint64_t>(page);
  local::RaiseGuard(begin, begin + kPage, PROT_READ | PROT_WRITE);
  ::mprotect(page, kPage, PROT_READ);
  const auto child = static_cast<pid_t>(::syscall(SYS_fork));
  if (child == 0) {
    ::alarm(10);
    *static_cast<volatile char*>(page) = 1;
    ::_exit(page[0] == 1 ? 0 : 1);
  }
  ::mprotect(page, kPage, PROT_READ | PROT_WRITE);
  local::LowerGuard();
  local::locks.address_space.Release();
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  ::munmap(page, kPage);
}

struct sigaction ours;
char* late_page;

// The guard goes between the fault and our handler's look at it: here, by a handler in front.
TEST(Guard, AFaultThatComesLateIsTriedAgain) {
  EXPECT_TRUE(InChild([] {
    auto watcher = local::Watcher::Get(0);
    if (!watcher) return false;
    late_page = OnePage();
    if (local::EnsureFaultHandler((*watcher)->fds().maps) != 0) return false;
    struct sigaction front {};
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
