// faulter: threads that do little but take faults, as runtimes do for null checks.
//
// Each writes to a page that it may not write to, and goes on behind that in its handler, again and
// again. One thread has a SIGSEGV waiting that was sent to it and is blocked. The report counts the
// faults; one that comes otherwise than expected ends the program. SIGTERM ends it.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "region.h"

namespace {

volatile sig_atomic_t end_wanted = 0;
std::atomic<uint64_t> faults = 0;
char* guarded = nullptr;
thread_local sigjmp_buf behind;

void OnFault(int, siginfo_t* info, void*) {
  if (info->si_addr != guarded || info->si_code != SEGV_ACCERR) {
    report::Fail("a fault at %p, code %d", info->si_addr, info->si_code);
  }
  siglongjmp(behind, 1);
}

void TakeFaults() {
  while (!end_wanted) {
    if (sigsetjmp(behind, 1) == 0) {
      *static_cast<volatile char*>(guarded) = 1;
      report::Fail("a write to a page without rights went through");
    }
    faults.fetch_add(1, std::memory_order_relaxed);
  }
}

void KeepOneBlocked() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGSEGV);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  pthread_kill(pthread_self(), SIGSEGV);
  while (!end_wanted) {
    const timespec pause{0, 10'000'000};
    nanosleep(&pause, nullptr);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const char* path = nullptr;
  int count = 4;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--report") == 0) path = argv[i + 1];
    if (std::strcmp(argv[i], "--threads") == 0) count = std::atoi(argv[i + 1]);
  }
  if (path == nullptr || argc % 2 == 0) {
    std::fputs("usage: faulter --report FILE [--threads N]\n", stderr);
    return 2;
  }
  report::Open("faulter", path);
  guarded = static_cast<char*>(MapAnonymous(nullptr, pages::kSize, PROT_READ, MAP_PRIVATE));
  struct sigaction action = {};
  action.sa_handler = [](int) { end_wanted = 1; };
  sigaction(SIGTERM, &action, nullptr);
  action.sa_sigaction = OnFault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(TakeFaults);
  threads.emplace_back(KeepOneBlocked);
  while (!end_wanted) {
    char text[64];
    std::snprintf(text, sizeof text, "\"ready\": true, \"operations\": %llu",
                  (unsigned long long)faults.load());
    report::Write(text);
    const timespec pause{0, 10'000'000};
    nanosleep(&pause, nullptr);
  }
  for (std::thread& thread : threads) thread.join();
}
