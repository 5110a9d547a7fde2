// zoo: one of each kind of mapping, with known contents, verified again and again.
//
// The report lists each kind with its address, or the reason why this kernel lacks it; the tests
// compare /proc/PID/maps and the VmFlags of smaps before and after. Once it has reported, the
// program maps and allocates nothing any more, so its map list stays as it is. Read-only and
// inaccessible ranges are also probed: a write, or a read, must fault.
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "pages.h"
#include "report.h"

namespace {

constexpr size_t kMib = size_t{1} << 20;

// A part of the zoo: pages [0, count) from `memory`, of which `Filled` says which have content.
struct Animal {
  const char* name;
  uint64_t* memory = nullptr;
  size_t count = 0;
  size_t stride = 1;  // every stride-th page is filled
  int protection = PROT_READ | PROT_WRITE;
  const char* missing = nullptr;  // why it is not there
};

constexpr size_t kMostAnimals = 40;
Animal animals[kMostAnimals];
size_t animal_count = 0;
std::atomic<bool> end_wanted{false};
sigjmp_buf fault_return;
volatile sig_atomic_t fault_expected = 0;

uint64_t NumberOf(size_t animal, size_t page) {
  return (animal << 32) + page;
}

uint64_t* Map(size_t bytes, int protection = PROT_READ | PROT_WRITE, int flags = 0) {
  // A PROT_NONE page on each side, so that each is a VMA of its own.
  auto* reserved = static_cast<char*>(mmap(nullptr, bytes + 2 * pages::kSize, PROT_NONE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0));
  if (reserved == MAP_FAILED) report::Fail("mmap: %s", std::strerror(errno));
  char* memory = reserved + pages::kSize;
  if (protection != PROT_NONE && mprotect(memory, bytes, protection) != 0) {
    report::Fail("mprotect: %s", std::strerror(errno));
  }
  return reinterpret_cast<uint64_t*>(memory);
}

Animal& Add(const char* name, uint64_t* memory, size_t count, size_t stride = 1) {
  if (animal_count == kMostAnimals) report::Fail("too many kinds");
  Animal& animal = animals[animal_count];
  animal = {name, memory, count, stride, PROT_READ | PROT_WRITE, nullptr};
  for (size_t i = 0; i < count; i += stride) {
    pages::Fill(memory + i * pages::kWords, NumberOf(animal_count, i), 1);
  }
  ++animal_count;
  return animal;
}

void AddMissing(const char* name, const char* why) {
  animals[animal_count++] = {name, nullptr, 0, 1, PROT_NONE, why};
}

Animal& AddMapped(const char* name, size_t count, size_t stride = 1) {
  return Add(name, Map(count * pages::kSize), count, stride);
}

void Protect(Animal& animal, int protection) {
  if (mprotect(animal.memory, animal.count * pages::kSize, protection) != 0) {
    animal.missing = std::strerror(errno);
    return;
  }
  animal.protection = protection;
}

void AddAdvised(const char* name, size_t count, int advice) {
  uint64_t* memory = Map(count * pages::kSize);
  if (madvise(memory, count * pages::kSize, advice) != 0) {
    AddMissing(name, std::strerror(errno));
    return;
  }
  Add(name, memory, count);
}

// Guards within a mapping (MADV_GUARD_INSTALL), a few pages of every 16.
constexpr size_t kGuardStride = 16, kGuardPages = 3;

void AddGuarded() {
  constexpr int kInstall = 102;  // MADV_GUARD_INSTALL, from 6.13
  Animal& animal = AddMapped("guard-pages", 64);
  for (size_t i = 0; i < animal.count; i += kGuardStride) {
    if (madvise(animal.memory + i * pages::kWords, kGuardPages * pages::kSize, kInstall) != 0) {
      animal.missing = "the kernel has no guard pages (MADV_GUARD_INSTALL)";
      return;
    }
  }
}

void AddNamed() {
#ifndef PR_SET_VMA
  constexpr int PR_SET_VMA = 0x53564d41;
  constexpr int PR_SET_VMA_ANON_NAME = 0;
#endif
  uint64_t* memory = Map(64 * pages::kSize);
  if (prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, memory, 64 * pages::kSize, "unmoor zoo") != 0) {
    AddMissing("named", "the kernel has no names for anonymous memory (CONFIG_ANON_VMA_NAME)");
    return;
  }
  Add("named", memory, 64);
}

// Neighbours of different protection, and holes between pages of one reserve.
void AddNeighbours() {
  uint64_t* memory = Map(96 * pages::kSize);
  Animal& writable = Add("neighbour-rw", memory, 32);
  Animal& read_only = Add("neighbour-ro", memory + 32 * pages::kWords, 32);
  Animal& executable = Add("neighbour-rx", memory + 64 * pages::kWords, 32);
  Protect(writable, PROT_READ | PROT_WRITE);
  Protect(read_only, PROT_READ);
  Protect(executable, PROT_READ | PROT_EXEC);

  uint64_t* reserve = Map(64 * pages::kSize, PROT_NONE);
  for (size_t i = 0; i < 3; ++i) {
    uint64_t* island = reserve + (8 + 20 * i) * pages::kWords;
    if (mprotect(island, 16 * pages::kSize, PROT_READ | PROT_WRITE) != 0) {
      report::Fail("mprotect: %s", std::strerror(errno));
    }
    Add("island-in-reserve", island, 16);
  }
}

void AddHeap() {
  const size_t length = 5 * kMib + 3 * pages::kSize;
  auto end = reinterpret_cast<uintptr_t>(sbrk(0));
  sbrk(static_cast<intptr_t>((pages::kSize - end % pages::kSize) % pages::kSize));
  void* memory = sbrk(static_cast<intptr_t>(length));
  if (memory == reinterpret_cast<void*>(-1)) report::Fail("sbrk: %s", std::strerror(errno));
  Add("heap", static_cast<uint64_t*>(memory), length / pages::kSize);
}

// Threads whose stacks hold a pattern; they only wait.
struct StackThread {
  uint64_t* words = nullptr;
  std::atomic<bool> ready{false};
};
StackThread stack_threads[3];
constexpr size_t kStackPages = 40;

void* KeepStack(void* argument) {
  auto* self = static_cast<StackThread*>(argument);
  alignas(pages::kSize) static thread_local uint64_t local[pages::kWords];
  alignas(pages::kSize) uint64_t words[kStackPages * pages::kWords];
  pages::Fill(local, 7, 7);
  self->words = words;
  for (size_t i = 0; i < kStackPages; ++i) {
    pages::Fill(words + i * pages::kWords, NumberOf(0x1000, i), 1);
  }
  self->ready.store(true);
  for (;;) {
    const timespec moment{0, 50'000'000};
    nanosleep(&moment, nullptr);
    if (!pages::Holds(local, 7, 7)) report::Fail("a thread's local storage changed");
  }
}

void AddThreads() {
  for (StackThread& thread : stack_threads) {
    pthread_t handle;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 512 * 1024);
    if (pthread_create(&handle, &attributes, KeepStack, &thread) != 0) {
      report::Fail("pthread_create failed");
    }
    pthread_detach(handle);
    while (!thread.ready.load()) sched_yield();
  }
}

// A private mapping of an ordinary file, partly copied on write; and memory shared with nobody.
void AddOthers() {
  const int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  void* file = mmap(nullptr, 16 * pages::kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
  close(fd);
  if (file == MAP_FAILED) {
    AddMissing("file-private", std::strerror(errno));
  } else {
    Add("file-private", static_cast<uint64_t*>(file), 8);
  }
  void* shared =
      mmap(nullptr, 64 * pages::kSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) report::Fail("mmap shared: %s", std::strerror(errno));
  Add("shared", static_cast<uint64_t*>(shared), 64);
}

void BuildZoo() {
  AddMapped("rw", 512);
  Protect(AddMapped("ro", 300), PROT_READ);
  Protect(AddMapped("rx", 40), PROT_READ | PROT_EXEC);
  Protect(AddMapped("rwx", 33), PROT_READ | PROT_WRITE | PROT_EXEC);
  Protect(AddMapped("none-with-content", 48), PROT_NONE);
  Add("none-reserve", Map(64 * kMib, PROT_NONE), 0).count = 64 * kMib / pages::kSize;
  animals[animal_count - 1].protection = PROT_NONE;
  Add("none-reserve-noreserve", Map(1024 * kMib, PROT_NONE, MAP_NORESERVE), 0);
  AddMapped("one-page", 1);
  AddMapped("two-pages", 2);
  AddMapped("odd-size", 3 * 512 + 7);
  AddMapped("every-third-page", 3000, 3);
  AddMapped("first-page-only", 4096, 4096);
  AddMapped("untouched", 1024, 1024).count = 0;
  AddMapped("large", 300 * kMib / pages::kSize);
  AddAdvised("hugepage", 8 * kMib / pages::kSize + 5, MADV_HUGEPAGE);
  AddAdvised("nohugepage", 4 * kMib / pages::kSize, MADV_NOHUGEPAGE);
  AddAdvised("dontfork", 64, MADV_DONTFORK);
  AddAdvised("dontdump", 64, MADV_DONTDUMP);
  AddAdvised("mergeable", 64, MADV_MERGEABLE);
  AddAdvised("wipeonfork", 64, MADV_WIPEONFORK);
  AddAdvised("random", 64, MADV_RANDOM);
  AddAdvised("sequential", 64, MADV_SEQUENTIAL);
  Add("noreserve", Map(256 * pages::kSize, PROT_READ | PROT_WRITE, MAP_NORESERVE), 256);
  AddGuarded();
  AddNamed();
  AddNeighbours();
  AddOthers();
  AddThreads();
  AddHeap();
}

void OnFault(int, siginfo_t* info, void*) {
  if (fault_expected) siglongjmp(fault_return, 1);
  report::Fail("unexpected fault at %p", info->si_addr);
}

bool Faults(volatile uint64_t* word, bool write) {
  if (sigsetjmp(fault_return, 1) != 0) {
    fault_expected = 0;
    return true;
  }
  fault_expected = 1;
  if (write) {
    *word = *word;
  } else {
    (void)*word;
  }
  fault_expected = 0;
  return false;
}

void Verify(size_t index, Animal& animal, bool last) {
  if (animal.missing != nullptr || animal.count == 0) return;
  // What is behind an inaccessible range can be looked at only once the map list no longer matters.
  if (last && std::strcmp(animal.name, "none-with-content") == 0) Protect(animal, PROT_READ);
  if ((animal.protection & PROT_READ) == 0) {
    if (!Faults(animal.memory, false)) report::Fail("%s became readable", animal.name);
    return;
  }
  if ((animal.protection & PROT_WRITE) == 0 && !Faults(animal.memory, true)) {
    report::Fail("%s became writable", animal.name);
  }
  const bool guarded = std::strcmp(animal.name, "guard-pages") == 0;
  for (size_t i = 0; i < animal.count; ++i) {
    uint64_t* page = animal.memory + i * pages::kWords;
    if (guarded && i % kGuardStride < kGuardPages) {
      if (!Faults(page, false)) report::Fail("page %zu is no guard any more", i);
      continue;
    }
    const bool filled = i % animal.stride == 0;
    if (filled ? pages::Holds(page, NumberOf(index, i), 1) : pages::IsZero(page)) continue;
    char what[256];
    pages::Describe(page, NumberOf(index, i), filled, what, sizeof what);
    report::Fail("%s: page %zu at %p %s", animal.name, i, static_cast<const void*>(page), what);
  }
}

// Reading a page that was never touched puts the zero page there; that is all verifying does.
void VerifyAll(bool last) {
  for (size_t i = 0; i < animal_count; ++i) Verify(i, animals[i], last);
  for (const StackThread& thread : stack_threads) {
    for (size_t i = 0; i < kStackPages; ++i) {
      if (!pages::Holds(thread.words + i * pages::kWords, NumberOf(0x1000, i), 1)) {
        report::Fail("page %zu of a thread's stack changed", i);
      }
    }
  }
}

void Report(uint64_t verified) {
  char text[3900];
  int length = std::snprintf(text, sizeof text, "\"ready\": true, \"verified\": %llu, \"kinds\": {",
                             (unsigned long long)verified);
  size_t islands = 0;
  for (size_t i = 0; i < animal_count; ++i) {
    const Animal& animal = animals[i];
    char suffix[8] = "";
    if (std::strcmp(animal.name, "island-in-reserve") == 0) {
      std::snprintf(suffix, sizeof suffix, "-%zu", islands++);
    }
    const size_t room = sizeof text - static_cast<size_t>(length);
    length += animal.missing != nullptr
                  ? std::snprintf(text + length, room, "%s\"%s%s\": \"%s\"", i > 0 ? ", " : "",
                                  animal.name, suffix, animal.missing)
                  : std::snprintf(text + length, room, "%s\"%s%s\": \"%p\"", i > 0 ? ", " : "",
                                  animal.name, suffix, static_cast<void*>(animal.memory));
  }
  std::snprintf(text + length, sizeof text - static_cast<size_t>(length), "}");
  report::Write(text);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || std::strcmp(argv[1], "--report") != 0) {
    std::fputs("usage: zoo --report FILE\nSIGTERM verifies all and ends.\n", stderr);
    return 2;
  }
  report::Open("zoo", argv[2]);
  struct sigaction action = {};
  action.sa_handler = [](int) { end_wanted = true; };
  sigaction(SIGTERM, &action, nullptr);
  BuildZoo();
  action.sa_handler = nullptr;
  action.sa_sigaction = OnFault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  for (uint64_t verified = 1;; ++verified) {
    const bool last = end_wanted.load();
    VerifyAll(last);
    Report(verified);
    if (last) return 0;
    const timespec pause{0, 100'000'000};
    nanosleep(&pause, nullptr);
  }
}
