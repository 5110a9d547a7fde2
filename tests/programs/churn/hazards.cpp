// The hazards: what programs do with their memory beyond reading and writing it, each checked at
// once.
//
// Each hazard is a thread with regions of its own, made before the program reports that it is
// ready, and kept mostly filled, so that a checkpoint finds content in all of them.
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <thread>

#include "churn/state.h"

extern char** environ;

namespace churn {
namespace {

struct Context {
  State& state;
  Region& region;
  Random random;
  bool Stopping() const { return state.stop.load(std::memory_order_relaxed); }
};

struct Range {
  size_t begin, end;
  size_t size() const { return end - begin; }
};

// Mostly a few pages, now and then a large part of the region.
Range ChooseRange(Context& context) {
  const size_t count = context.region.count();
  const size_t most = context.random.OneIn(16) ? count : 64;
  const size_t length = 1 + context.random.Below(most < count ? most : count);
  const size_t begin = context.random.Below(count - length + 1);
  return {begin, begin + length};
}

// The pages around a range, which what is done to the range must leave as they were.
void CheckAround(const Region& region, Range range, const char* when) {
  region.CheckRange(range.begin < 4 ? 0 : range.begin - 4, range.begin, when);
  region.CheckRange(range.end, range.end + 4 < region.count() ? range.end + 4 : region.count(),
                    when);
}

void Count(std::atomic<uint64_t>& counter) {
  counter.fetch_add(1, std::memory_order_relaxed);
}

void Demand(bool holds, const char* what) {
  if (!holds) report::Fail("%s: %s", what, std::strerror(errno));
}

void DontNeed(Context& context) {
  Region& region = context.region;
  const Range range = ChooseRange(context);
  region.CheckRange(range.begin, range.end, "before MADV_DONTNEED");
  region.ExpectZero(range.begin, range.end);
  Demand(madvise(region.Address(range.begin), range.size() * pages::kSize, MADV_DONTNEED) == 0,
         "MADV_DONTNEED");
  region.CheckRange(range.begin, range.end, "after MADV_DONTNEED");
  CheckAround(region, range, "beside MADV_DONTNEED");
  region.WriteRange(range.begin, range.end - (range.size() > 8 ? 2 : 0));
  Count(context.state.hazards.dontneed);
}

// After MADV_FREE a page holds what it held, or zero, until it is written.
void MadvFree(Context& context) {
  Region& region = context.region;
  const Range range = ChooseRange(context);
  region.CheckRange(range.begin, range.end, "before MADV_FREE");
  if (madvise(region.Address(range.begin), range.size() * pages::kSize, MADV_FREE) != 0) {
    Demand(errno == EINVAL, "MADV_FREE");
    Count(context.state.hazards.madv_free_refused);
    return;
  }
  for (size_t i = range.begin; i < range.end; ++i) region.CheckUnlessFreed(i, "after MADV_FREE");
  region.WriteRange(range.begin, range.end);
  region.CheckRange(range.begin, range.end, "written after MADV_FREE");
  CheckAround(region, range, "beside MADV_FREE");
  Count(context.state.hazards.madv_free);
}

// Grows, shrinks and moves a mapping by mremap.
void Remap(Context& context) {
  Region& region = context.region;
  const size_t most = context.state.options.hazard_mib * 256 * 2;
  const size_t old_count = region.count();
  size_t count = old_count;
  int flags = MREMAP_MAYMOVE;
  void* target = nullptr;
  switch (context.random.Below(3)) {
    case 0:
      count += 1 + context.random.Below(256);
      if (count > most) count = most / 2;
      break;
    case 1:
      count -= context.random.Below(count / 4);
      break;
    default:  // a move to a place of our choice
      target = MapAnonymous(nullptr, count * pages::kSize, PROT_NONE, MAP_PRIVATE);
      flags |= MREMAP_FIXED;
      break;
  }
  void* moved =
      mremap(region.Address(0), old_count * pages::kSize, count * pages::kSize, flags, target);
  Demand(moved != MAP_FAILED, "mremap");
  region.MovedTo(moved, count);
  if (count > old_count) region.ExpectZero(old_count, count);
  region.CheckRange(0, count,
                    count > old_count   ? "after growth by mremap"
                    : count < old_count ? "after shrinking by mremap"
                                        : "after a move by mremap");
  if (count > old_count) region.WriteRange(old_count, count);
  Count(context.state.hazards.remapped);
}

// The heap's end moves up and down. Nothing in this program may allocate meanwhile: shrinking is
// given up where something did.
void GrowHeap(Context& context) {
  const size_t length = (1 + context.random.Below(512)) * pages::kSize;
  void* end = sbrk(static_cast<intptr_t>(length));
  Demand(end != reinterpret_cast<void*>(-1), "sbrk");
  auto* words = static_cast<uint64_t*>(end);
  for (size_t i = 0; i < length / sizeof(uint64_t); ++i) {
    if (words[i] != 0)
      report::Fail("memory new to the heap at %p is not zero", static_cast<void*>(words + i));
  }
  for (size_t i = 0; i < length / sizeof(uint64_t); ++i) words[i] = pages::Mix(i);
  for (size_t i = 0; i < length / sizeof(uint64_t); ++i) {
    if (words[i] != pages::Mix(i))
      report::Fail("a write to the heap at %p was lost", static_cast<void*>(words + i));
  }
  // Once in four the growth stays, up to 32 MiB.
  static size_t kept = 0;
  const bool keep = kept < (size_t{32} << 20) && context.random.OneIn(4);
  if (keep) kept += length;
  if (!keep && sbrk(0) == reinterpret_cast<char*>(end) + length)
    sbrk(-static_cast<intptr_t>(length));
  Count(context.state.hazards.grown_heap);
}

thread_local sigjmp_buf fault_return;
thread_local volatile sig_atomic_t fault_expected = 0;

void OnFault(int signal, siginfo_t* info, void*) {
  if (fault_expected) siglongjmp(fault_return, 1);
  struct sigaction plain = {};
  plain.sa_handler = SIG_DFL;
  sigaction(signal, &plain, nullptr);
  report::Fail("unexpected signal %d (code %d) at %p", signal, info->si_code, info->si_addr);
}

bool Faults(volatile uint64_t* word, bool write) {
  if (sigsetjmp(fault_return, 1) != 0) {
    fault_expected = 0;
    return true;
  }
  fault_expected = 1;
  if (write) {
    *word = 1;
  } else {
    (void)*word;
  }
  fault_expected = 0;
  return false;
}

void Protect(Context& context) {
  Region& region = context.region;
  const Range range = ChooseRange(context);
  const size_t length = range.size() * pages::kSize;
  void* address = region.Address(range.begin);
  Demand(mprotect(address, length, PROT_READ) == 0, "mprotect read-only");
  region.CheckRange(range.begin, range.end, "read-only");
  const size_t probe = range.begin + context.random.Below(range.size());
  if (!Faults(region.Page(probe), true)) {
    report::Fail("a write to read-only page %zu at %p went through", probe, region.Address(probe));
  }
  Demand(mprotect(address, length, PROT_NONE) == 0, "mprotect none");
  if (!Faults(region.Page(probe), false)) {
    report::Fail("a read of page %zu at %p without rights went through", probe,
                 region.Address(probe));
  }
  Demand(mprotect(address, length, PROT_READ | PROT_WRITE) == 0, "mprotect read-write");
  region.CheckRange(range.begin, range.end, "after mprotect and back");
  region.WriteRange(range.begin, range.end);
  CheckAround(region, range, "beside mprotect");
  Count(context.state.hazards.protected_);
}

void MapOver(Context& context) {
  Region& region = context.region;
  const Range range = ChooseRange(context);
  region.CheckRange(range.begin, range.end, "before mmap over it");
  region.ExpectZero(range.begin, range.end);
  MapAnonymous(region.Address(range.begin), range.size() * pages::kSize, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_FIXED);
  region.CheckRange(range.begin, range.end, "after mmap over it");
  region.WriteRange(range.begin, range.end);
  CheckAround(region, range, "beside mmap over a part");
  Count(context.state.hazards.mapped_over);
}

// A hole must stay a hole for as long as it is one, and what is mapped there next must be left
// alone.
void Unmap(Context& context) {
  Region& region = context.region;
  const Range range = ChooseRange(context);
  region.CheckRange(range.begin, range.end, "before munmap");
  region.ExpectZero(range.begin, range.end);
  void* address = region.Address(range.begin);
  Demand(munmap(address, range.size() * pages::kSize) == 0, "munmap");
  const timespec moment{0, static_cast<long>(context.random.Below(3'000'000))};
  nanosleep(&moment, nullptr);
  if (!Faults(region.Page(range.begin + context.random.Below(range.size())), false)) {
    report::Fail("something was mapped where the program had unmapped, at %p", address);
  }
  void* mapped = mmap(address, range.size() * pages::kSize, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (mapped != address) {
    report::Fail("where the program had unmapped, at %p, something else is: %s", address,
                 std::strerror(errno));
  }
  region.CheckRange(range.begin, range.end, "mapped anew after munmap");
  region.WriteRange(range.begin, range.end);
  CheckAround(region, range, "beside munmap");
  Count(context.state.hazards.unmapped);
}

// Runs another program, as vfork does: the child shares the memory until it executes.
void Spawn(Context& context) {
  char program[] = "/bin/true";
  char* const arguments[] = {program, nullptr};
  pid_t child = 0;
  errno = posix_spawn(&child, program, nullptr, nullptr, arguments, environ);
  Demand(errno == 0, "posix_spawn");
  int status = 0;
  while (waitpid(child, &status, 0) < 0) Demand(errno == EINTR, "waitpid of a spawned child");
  if (status != 0) report::Fail("/bin/true ended with wait status 0x%x", status);
  Count(context.state.hazards.spawned);
}

thread_local uint64_t thread_words[512];

// Lives on a stack and in thread-local storage of its own, and checks both.
void LiveShortly(uint64_t seed) {
  volatile uint64_t on_stack[4096];
  for (size_t i = 0; i < 4096; ++i) on_stack[i] = pages::Mix(seed + i);
  for (size_t i = 0; i < 512; ++i) thread_words[i] = seed ^ i;
  for (int round = 0; round < 4; ++round) {
    const timespec moment{0, 200'000};
    nanosleep(&moment, nullptr);
    for (size_t i = 0; i < 4096; ++i) {
      if (on_stack[i] != pages::Mix(seed + i)) report::Fail("a thread's stack changed under it");
    }
    for (size_t i = 0; i < 512; ++i) {
      if (thread_words[i] != (seed ^ i)) report::Fail("thread-local storage changed");
    }
  }
}

void BearThreads(Context& context) {
  std::thread brood[3];
  for (auto& thread : brood) {
    thread = std::thread(LiveShortly, context.random.Next());
    Count(context.state.hazards.threads_born);
  }
  for (auto& thread : brood) thread.join();
}

// The kernel writes into the region: datagrams must neither fail (EFAULT) nor be lost.
class SystemCalls {
 public:
  SystemCalls() {
    Demand(socketpair(AF_UNIX, SOCK_DGRAM, 0, sockets_) == 0, "socketpair");
    Demand(pipe(pipe_) == 0, "pipe");
    epoll_ = epoll_create1(0);
    Demand(epoll_ >= 0, "epoll_create1");
    epoll_event event = {};
    event.events = EPOLLIN;
    Demand(epoll_ctl(epoll_, EPOLL_CTL_ADD, sockets_[1], &event) == 0, "epoll_ctl");
  }

  void operator()(Context& context) {
    Region& region = context.region;
    const size_t page = context.random.Below(region.count());
    region.Check(page, "before a system call writes it");
    alignas(64) uint64_t sent[pages::kWords];
    std::memcpy(sent, region.Page(page), pages::kSize);
    // The region's next write to this page, but by the kernel's hand.
    region.Write(page);
    std::memcpy(sent, region.Page(page), pages::kSize);
    std::memset(region.Page(page), 0x5a, pages::kSize);
    if (context.random.OneIn(2)) {
      Demand(send(sockets_[0], sent, sizeof sent, 0) == sizeof sent, "send");
      epoll_event event = {};
      int ready = 0;
      while ((ready = epoll_wait(epoll_, &event, 1, 1000)) < 0) {
        Demand(errno == EINTR, "epoll_wait");
        Count(context.state.hazards.interrupted);
      }
      if (ready == 0) report::Fail("a datagram was lost");
      Demand(recv(sockets_[1], region.Page(page), pages::kSize, 0) == sizeof sent, "recv");
    } else {
      Demand(write(pipe_[1], sent, sizeof sent) == sizeof sent, "write to a pipe");
      Demand(read(pipe_[0], region.Page(page), pages::kSize) == sizeof sent, "read from a pipe");
    }
    region.Check(page, "after a system call wrote it");
    Demand(getrandom(sent, 256, 0) == 256, "getrandom");
    Count(context.state.hazards.syscalls);
  }

 private:
  int sockets_[2];
  int pipe_[2];
  int epoll_ = -1;
};

// A mutex with priority inheritance in the region's memory: the kernel writes its word.
void LockInheriting(Context& context) {
  static pthread_mutex_t* mutex = nullptr;
  if (mutex == nullptr) {
    mutex = static_cast<pthread_mutex_t*>(
        MapAnonymous(nullptr, pages::kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE));
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    errno = pthread_mutex_init(mutex, &attributes);
    Demand(errno == 0, "pthread_mutex_init");
  }
  errno = pthread_mutex_lock(mutex);
  Demand(errno == 0, "pthread_mutex_lock with priority inheritance");
  std::thread rival([] {
    errno = pthread_mutex_lock(mutex);
    Demand(errno == 0, "pthread_mutex_lock, contended");
    pthread_mutex_unlock(mutex);
  });
  const timespec moment{0, 100'000};
  nanosleep(&moment, nullptr);
  pthread_mutex_unlock(mutex);
  rival.join();
  (void)context;
}

}  // namespace

struct HazardThreads::Thread {
  Thread(State& state, void (*action)(Context&), uint64_t number)
      : region(state.options.hazard_mib * 256, number << 32, state.options.hazard_mib * 256 * 4,
               PlaceOf(number)),
        state(state),
        act(action),
        seed(number) {
    region.WriteRange(0, region.count());
  }

  // Far below where the kernel puts new mappings: it would otherwise fill the holes that Unmap
  // makes with the other threads' stacks.
  static void* PlaceOf(uint64_t number) {
    return reinterpret_cast<void*>(uintptr_t{0x100000000000} + (number << 36));
  }

  void Run() {
    Context context{state, region, Random(seed)};
    uint64_t next_sweep = report::NowNanos();
    while (!context.Stopping()) {
      act(context);
      if (report::NowNanos() > next_sweep) {
        region.CheckRange(0, region.count(), "sweep of a hazard's region");
        next_sweep = report::NowNanos() + 1'000'000'000;
      }
      const timespec moment{static_cast<time_t>(state.options.hazard_us / 1'000'000),
                            static_cast<long>(state.options.hazard_us % 1'000'000 * 1000)};
      nanosleep(&moment, nullptr);
    }
    region.CheckRange(0, region.count(), "last sweep of a hazard's region");
  }

  Region region;
  State& state;
  void (*act)(Context&);
  uint64_t seed;
  std::thread thread;
};

HazardThreads::HazardThreads(State& state) : state_(state) {
  struct sigaction on_fault = {};
  on_fault.sa_sigaction = OnFault;
  on_fault.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &on_fault, nullptr);
  sigaction(SIGBUS, &on_fault, nullptr);
  const Options& options = state.options;
  uint64_t number = 1;
  const auto add = [&](bool wanted, void (*action)(Context&)) {
    if (wanted) threads_.push_back(std::make_unique<Thread>(state_, action, number));
    ++number;
  };
  add(options.dontneed, DontNeed);
  add(options.madv_free, MadvFree);
  add(options.remapper, Remap);
  add(options.grow_heap, GrowHeap);
  add(options.mprotect, Protect);
  add(options.mmap_over, MapOver);
  add(options.munmap, Unmap);
  add(options.spawn, Spawn);
  add(options.threads_churn, BearThreads);
  add(options.syscalls, [](Context& context) {
    static SystemCalls calls;
    calls(context);
  });
  add(options.syscalls, LockInheriting);
}

HazardThreads::~HazardThreads() = default;

void HazardThreads::Start() {
  for (auto& thread : threads_) thread->thread = std::thread([t = thread.get()] { t->Run(); });
}

void HazardThreads::Join() {
  for (auto& thread : threads_) thread->thread.join();
}

}  // namespace churn
