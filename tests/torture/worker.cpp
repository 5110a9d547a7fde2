// See worker.h.
#include "worker.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "failure.h"
#include "pages.h"

namespace torture {
namespace {

constexpr size_t kPage = pages::kSize;
constexpr size_t kSparePages = 16;
constexpr uint64_t kSpareShift = uint64_t{1} << 36;  // from the arena's begin
constexpr size_t kSignalWord = 5;

// Of the running thread, for its signal handlers.
struct Handlers {
  uint64_t* word = nullptr;  // in direct-mapped memory
  volatile uint64_t runs = 0;
  volatile uintptr_t expected_fault = 0;  // page of it; 0: none
  volatile bool expects_fault = false;
  sigjmp_buf back;
};
thread_local Handlers handlers;

void OnFault(int signal, siginfo_t* info, void* context) {
  const auto page = reinterpret_cast<uintptr_t>(info->si_addr) / kPage;
  if (!handlers.expects_fault || page != handlers.expected_fault / kPage) {
    char name[16] = {};
    prctl(PR_GET_NAME, name);
    // Where in the program: as `addr2line` takes it.
    extern const char executable_begin __asm__("__executable_start");
    const auto at =
        static_cast<uint64_t>(static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
    Fail("unexpected signal %d, code %d, at %p, in thread %s at %#llx", signal, info->si_code,
         info->si_addr, name,
         (unsigned long long)(at - reinterpret_cast<uintptr_t>(&executable_begin)));
  }
  handlers.expects_fault = false;
  siglongjmp(handlers.back, 1);
}

void OnSignal(int, siginfo_t*, void*) {
  if (handlers.word == nullptr) return;
  volatile uint64_t* word = handlers.word;
  *word = *word + 1;
  handlers.runs = handlers.runs + 1;
}

// Whether a load from (or store to) `at` ends in the program's own handler.
__attribute__((noinline, no_sanitize("address", "thread", "undefined"))) bool Faults(
    volatile uint64_t* at, bool store) {
  handlers.expected_fault = reinterpret_cast<uintptr_t>(at);
  if (sigsetjmp(handlers.back, 1) != 0) return true;
  handlers.expects_fault = true;
  if (store) {
    *at = 1;
  } else {
    (void)*at;
  }
  handlers.expects_fault = false;
  return false;
}

void Must(bool condition, const char* what) {
  if (!condition) Fail("%s: %s", what, std::strerror(errno));
}

}  // namespace

void InstallHandlers() {
  struct sigaction action{};
  sigemptyset(&action.sa_mask);
  action.sa_sigaction = OnFault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  action.sa_sigaction = OnSignal;
  sigaddset(&action.sa_mask, SIGUSR1);
  sigaddset(&action.sa_mask, SIGUSR2);
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigaction(SIGUSR1, &action, nullptr);
  action.sa_flags |= SA_ONSTACK;
  sigaction(SIGUSR2, &action, nullptr);
  signal(SIGPIPE, SIG_IGN);
}

Writer::Writer(RoundState& round, Arena& arena, size_t index, uint64_t seed)
    : round_(round), arena_(arena), index_(index), random_(seed) {
  const uint64_t spare = arena.ranges().front().address / kSpareShift * kSpareShift + kSpareShift +
                         index * 2 * kSparePages * kPage;
  spare_ = reinterpret_cast<uint64_t*>(spare);  // SAFETY: a place nobody else uses
  for (Chunk* chunk : arena.ChunksOf(index)) {
    if (chunk->use == Use::kStack && stack_ == nullptr) {
      stack_ = chunk;
    } else if (chunk->use == Use::kSignalStack && signal_stack_ == nullptr) {
      signal_stack_ = chunk;
    } else if (chunk->use == Use::kPages) {
      all_.push_back(chunk);
      if ((chunk->protection & PROT_READ) == 0) secret_.push_back(chunk);
      if ((chunk->protection & PROT_WRITE) == 0) continue;
      writable_.push_back(chunk);
      if (!chunk->quiet) loud_.push_back(chunk);
    }
  }
  Must(pipe(pipe_) == 0, "pipe");
  Must(socketpair(AF_UNIX, SOCK_DGRAM, 0, datagrams_) == 0, "socketpair");
}

Writer::~Writer() {
  for (const int fd : {pipe_[0], pipe_[1], datagrams_[0], datagrams_[1]}) close(fd);
}

void Writer::Start() {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  if (stack_ != nullptr) {
    pthread_attr_setstack(&attributes, stack_->base, stack_->count() * kPage);
  } else {
    pthread_attr_setstacksize(&attributes, 512 << 10);
  }
  const int error = pthread_create(&thread_, &attributes, Main, this);
  if (error != 0) Fail("pthread_create: %s", std::strerror(error));
  pthread_attr_destroy(&attributes);
}

void Writer::Join() {
  pthread_join(thread_, nullptr);
}

void* Writer::Main(void* self) {
  static_cast<Writer*>(self)->Run();
  return nullptr;
}

void Writer::PrepareSignals() {
  stack_t stack{};
  if (signal_stack_ != nullptr) {
    stack.ss_sp = signal_stack_->base;
    stack.ss_size = signal_stack_->count() * kPage;
  } else {
    own_signal_stack_.resize(64 << 10);
    stack.ss_sp = own_signal_stack_.data();
    stack.ss_size = own_signal_stack_.size();
  }
  Must(sigaltstack(&stack, nullptr) == 0, "sigaltstack");
  for (Chunk* chunk : writable_) {
    if (chunk->count() < 2) continue;
    chunk->reserved = 1;
    signal_word_before_ = chunk->base[kSignalWord];
    handlers.runs = 0;
    handlers.word = chunk->base + kSignalWord;
    break;
  }
}

void Writer::Run() {
  ThisThread().thread = static_cast<int>(index_);
  PrepareSignals();
  while (!round_.begin.load()) usleep(100);
  while (!round_.stop.load(std::memory_order_relaxed)) {
    Operate();
    // Many writers leave some of the machine to the remapper.
    if (round_.crowded && OneIn(random_, 16)) usleep(static_cast<useconds_t>(Below(random_, 3000)));
  }
  ThisThread().what = "last sweep";
  Sweep();
  CheckSignalWord();
  round_.tally->signals += handlers.runs;
  // Signals may come until the thread is joined, but count no more.
  handlers.word = nullptr;
  ++round_.ended;
  while (round_.ended.load() >= 0) usleep(500);
  stack_t none{};
  none.ss_flags = SS_DISABLE;
  sigaltstack(&none, nullptr);
}

Writer::Target Writer::Pick(const std::vector<Chunk*>& from, size_t most) {
  if (from.empty()) return {};
  Chunk* chunk = from[Below(random_, from.size())];
  const size_t room = chunk->count() - chunk->reserved;
  if (room == 0) return {};
  const size_t page = chunk->reserved + Below(random_, room);
  return {chunk, page, 1 + Below(random_, std::min(most, chunk->count() - page))};
}

void Writer::Operate() {
  struct Kind {
    const char* name;
    unsigned weight;
    void (*act)(Writer&);
  };
  static constexpr Kind kKinds[] = {
      {"write", 6000, [](Writer& w) { w.Write(); }},
      {"check", 1500, [](Writer& w) { w.Look(); }},
      {"count", 1500, [](Writer& w) { w.Count(); }},
      {"giveback", 60, [](Writer& w) { w.GiveBack(); }},
      {"free", 20, [](Writer& w) { w.FreeLazily(); }},
      {"protect", 30, [](Writer& w) { w.Protect(); }},
      {"deny", 15, [](Writer& w) { w.Deny(); }},
      {"move", 15, [](Writer& w) { w.Move(); }},
      {"remap", 4, [](Writer& w) { w.Remap(); }},
      {"cover", 10, [](Writer& w) { w.Cover(); }},
      {"fork", 2, [](Writer& w) { w.Fork(false); }},
      {"rawfork", 1, [](Writer& w) { w.Fork(true); }},
      {"spawn", 1, [](Writer& w) { w.Spawn(); }},
      {"pipe", 120, [](Writer& w) { w.ReadPipe(); }},
      {"datagram", 120, [](Writer& w) { w.ReadDatagram(); }},
      {"random", 60, [](Writer& w) { w.ReadRandom(); }},
      {"direct", 60, [](Writer& w) { w.ReadDirect(); }},
      {"probe", 30, [](Writer& w) { w.Probe(); }},
      {"born", 4, [](Writer& w) { w.BearThread(); }},
      {"block", 30, [](Writer& w) { w.BlockSignals(); }},
  };
  unsigned all = 0;
  for (const Kind& kind : kKinds) all += kind.weight;
  auto choice = static_cast<unsigned>(Below(random_, all));
  const Kind* kind = kKinds;
  while (choice >= kind->weight) choice -= (kind++)->weight;
  operations_.store(operations() + 1, std::memory_order_relaxed);
  ThisThread().operation = operations();
  ThisThread().what = kind->name;
  if (Allows(*round_.options, kind->name)) kind->act(*this);
}

// --- loads and stores ----------------------------------------------------------------------------

void Writer::Write() {
  const Target target = Pick(writable_, 4);
  for (size_t i = 0; i < target.count; ++i) {
    target.chunk->Check(target.page + i, "before it is written");
    target.chunk->Write(target.page + i);
  }
  round_.tally->writes.fetch_add(target.count, std::memory_order_relaxed);
}

void Writer::Look() {
  const Target target = Pick(all_, 8);
  if (target.chunk == nullptr || (target.chunk->protection & PROT_READ) == 0) return;
  for (size_t i = 0; i < target.count; ++i) target.chunk->Check(target.page + i, "looked at");
  CheckSignalWord();
}

void Writer::Count() {
  __atomic_fetch_add(&arena_.counters()[Below(random_, pages::kWords)], 1, __ATOMIC_RELAXED);
  ++added_;
}

void Writer::CheckSignalWord() {
  if (handlers.word == nullptr) return;
  for (;;) {
    const uint64_t runs = handlers.runs;
    const uint64_t word = *static_cast<volatile uint64_t*>(handlers.word);
    if (runs != handlers.runs) continue;  // one came in between
    if (word - signal_word_before_ == runs) return;
    Fail("the signal handler ran %llu times, its word at %p counts %llu", (unsigned long long)runs,
         static_cast<void*>(handlers.word), (unsigned long long)(word - signal_word_before_));
  }
}

void Writer::BlockSignals() {
  sigset_t blocked;
  sigset_t before;
  sigfillset(&blocked);
  sigdelset(&blocked, SIGSEGV);  // promised for quiet ranges
  sigdelset(&blocked, SIGBUS);
  pthread_sigmask(SIG_BLOCK, &blocked, &before);
  for (int i = 0; i < 50; ++i) Write();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// --- the address space ---------------------------------------------------------------------------

void Writer::GiveBack() {
  const Target target = Pick(loud_, 24);
  if (target.chunk == nullptr || pthread_rwlock_tryrdlock(&round_.watched) != 0) return;
  Must(madvise(target.chunk->At(target.page), target.count * kPage, MADV_DONTNEED) == 0,
       "MADV_DONTNEED");
  for (size_t i = 0; i < target.count; ++i) {
    target.chunk->SetZero(target.page + i);
    target.chunk->Check(target.page + i, "right after MADV_DONTNEED");
  }
  pthread_rwlock_unlock(&round_.watched);
  round_.tally->given_back.fetch_add(target.count, std::memory_order_relaxed);
}

void Writer::FreeLazily() {
  const Target target = Pick(loud_, 8);
  if (target.chunk == nullptr || pthread_rwlock_tryrdlock(&round_.watched) != 0) return;
  // EINVAL: on file mappings of kernels that want to be told otherwise.
  const int result = madvise(target.chunk->At(target.page), target.count * kPage, MADV_FREE);
  Must(result == 0 || errno == EINVAL, "MADV_FREE");
  for (size_t i = 0; i < target.count; ++i) {
    if (result == 0) target.chunk->CheckFreed(target.page + i);
    target.chunk->Write(target.page + i);
    target.chunk->Check(target.page + i, "written after MADV_FREE");
  }
  pthread_rwlock_unlock(&round_.watched);
}

void Writer::Protect() {
  const bool secret = !secret_.empty() && OneIn(random_, 2);
  const Target target = Pick(secret ? secret_ : loud_, 40);
  if (target.chunk == nullptr || target.chunk->quiet) return;
  uint64_t* at = target.chunk->At(target.page);
  Must(mprotect(at, target.count * kPage, PROT_READ) == 0, "mprotect");
  for (size_t i = 0; i < target.count; ++i) target.chunk->Check(target.page + i, "read-only");
  Must(mprotect(at, target.count * kPage, target.chunk->protection) == 0, "mprotect");
  round_.tally->protected_.fetch_add(1, std::memory_order_relaxed);
}

// A store that the program itself forbade must end in the program's handler.
void Writer::Deny() {
  const Target target = Pick(loud_, 1);
  if (target.chunk == nullptr) return;
  uint64_t* at = target.chunk->At(target.page);
  Must(mprotect(at, kPage, PROT_READ) == 0, "mprotect");
  if (!Faults(at + Below(random_, pages::kWords), true)) {
    Fail("a store to a page the program made read-only went through");
  }
  Must(mprotect(at, kPage, target.chunk->protection) == 0, "mprotect");
  target.chunk->Check(target.page, "after a denied store");
  round_.tally->probes.fetch_add(1, std::memory_order_relaxed);
}

// Out of the arena and back.
void Writer::Move() {
  const Target target = Pick(loud_, OneIn(random_, 2) ? 1 : kSparePages);
  // What is out of its place while the remapper starts is not watched (docs/guarantees.md).
  if (target.chunk == nullptr || pthread_rwlock_tryrdlock(&round_.watched) != 0) return;
  MoveAndBack(target);
  pthread_rwlock_unlock(&round_.watched);
}

void Writer::MoveAndBack(const Target& target) {
  uint64_t* at = target.chunk->At(target.page);
  const size_t size = target.count * kPage;
  if (mremap(at, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, spare_) == MAP_FAILED) {
    // More than one mapping for the moment (guarantees.md).
    Must(errno == EFAULT && target.count > 1, "mremap");
    return TakeBack(target);
  }
  for (size_t i = 0; i < target.count; ++i) {
    uint64_t* place = spare_ + i * pages::kWords;
    target.chunk->Check(target.page + i, place, "after mremap");
    if (OneIn(random_, 2)) target.chunk->WriteAt(target.page + i, place);
  }
  if (mremap(spare_, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, at) == MAP_FAILED) {
    Must(errno == EFAULT && target.count > 1, "mremap back");
    TakeBack(target);
  }
  for (size_t i = 0; i < target.count; ++i) {
    target.chunk->Check(target.page + i, "after mremap and back");
  }
  round_.tally->moved.fetch_add(1, std::memory_order_relaxed);
}

// After an mremap that failed: Linux 6.17 and later move some of several mappings and then fail.
void Writer::TakeBack(const Target& target) {
  for (size_t i = 0; i < target.count; ++i) {
    uint64_t* at = target.chunk->At(target.page + i);
    unsigned char present = 0;
    if (mincore(at, kPage, &present) != 0) {
      Must(
          mremap(spare_ + i * pages::kWords, kPage, kPage, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at,
          "mremap of one page back");
    }
    target.chunk->Check(target.page + i, "after mremap failed");
  }
}

// Unmapped, and mapped anew; nobody may have put anything there meanwhile.
void Writer::Remap() {
  const Target target = Pick(loud_, 12);
  if (target.chunk == nullptr) return;
  uint64_t* at = target.chunk->At(target.page);
  Must(munmap(at, target.count * kPage) == 0, "munmap");
  if (OneIn(random_, 4)) usleep(static_cast<useconds_t>(Below(random_, 2000)));
  Must(mmap(at, target.count * kPage, target.chunk->protection,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == at,
       "mmap where memory was unmapped");
  for (size_t i = 0; i < target.count; ++i) {
    target.chunk->SetZero(target.page + i);
    target.chunk->Check(target.page + i, "mapped anew");
  }
  round_.tally->covered.fetch_add(1, std::memory_order_relaxed);
}

void Writer::Cover() {
  const Target target = Pick(loud_, 12);
  if (target.chunk == nullptr) return;
  uint64_t* at = target.chunk->At(target.page);
  Must(mmap(at, target.count * kPage, target.chunk->protection,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at,
       "mmap over memory");
  for (size_t i = 0; i < target.count; ++i) {
    target.chunk->SetZero(target.page + i);
    target.chunk->Check(target.page + i, "mapped over");
  }
  round_.tally->covered.fetch_add(1, std::memory_order_relaxed);
}

// --- processes and threads -----------------------------------------------------------------------

void Writer::Fork(bool raw) {
  const pid_t child = raw ? static_cast<pid_t>(syscall(SYS_fork)) : fork();
  Must(child >= 0, "fork");
  if (child == 0) LiveAsChild();
  int status = 0;
  while (waitpid(child, &status, 0) < 0) Must(errno == EINTR, "waitpid");
  if (WIFSIGNALED(status)) Fail("a forked child was killed by signal %d", WTERMSIG(status));
  if (WEXITSTATUS(status) != 0) Fail("a forked child found wrong memory (above)");
  Look();
  round_.tally->forks.fetch_add(1, std::memory_order_relaxed);
}

// The writer's own pages hold still at a fork; the others' may have been caught in mid-write.
void Writer::LiveAsChild() {
  BecomeChild();
  const size_t step = 1 + Below(random_, 8);
  for (Chunk* chunk : all_) {
    if ((chunk->protection & PROT_READ) == 0) continue;
    for (size_t page = chunk->reserved; page < chunk->count(); page += step) {
      chunk->Check(page, "in a forked child");
    }
  }
  for (Chunk* chunk : writable_) {
    for (size_t page = chunk->reserved; page < chunk->count(); page += 4 * step) {
      chunk->Write(page);
      chunk->Check(page, "written in a forked child");
    }
  }
  __atomic_fetch_add(&arena_.counters()[0], 1, __ATOMIC_RELAXED);
  syscall(SYS_exit_group, 0);  // past locks a bare fork may have found held
  __builtin_unreachable();
}

void Writer::Spawn() {
  char name[] = "/bin/true";
  char* arguments[] = {name, nullptr};
  pid_t child = 0;
  const int error = posix_spawn(&child, name, nullptr, nullptr, arguments, nullptr);
  if (error != 0) Fail("posix_spawn: %s", std::strerror(error));
  int status = 0;
  while (waitpid(child, &status, 0) < 0) Must(errno == EINTR, "waitpid");
  if (status != 0) Fail("/bin/true ended with status %d", status);
  round_.tally->spawned.fetch_add(1, std::memory_order_relaxed);
}

// A short-lived thread that writes for this one.
void Writer::BearThread() {
  pthread_t thread;
  const auto body = [](void* self) -> void* {
    auto* writer = static_cast<Writer*>(self);
    ThisThread().thread = static_cast<int>(writer->index_);
    ThisThread().what = "a thread born meanwhile";
    for (int i = 0; i < 20; ++i) writer->Write();
    return nullptr;
  };
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 256 << 10);
  const int error = pthread_create(&thread, &attributes, body, this);
  pthread_attr_destroy(&attributes);
  if (error != 0) Fail("pthread_create: %s", std::strerror(error));
  pthread_join(thread, nullptr);
  round_.tally->threads.fetch_add(1, std::memory_order_relaxed);
}

// --- system calls that write into the memory -----------------------------------------------------

void Writer::ReadPipe() {
  const Target target = Pick(loud_, 1);
  if (target.chunk == nullptr) return;
  uint64_t out[pages::kWords];
  const uint64_t number = target.chunk->first_number + target.page;
  const uint64_t sequence = ++target.chunk->ledger[target.page].sequence;
  pages::Fill(out, number, sequence);
  Must(write(pipe_[1], out, kPage) == static_cast<ssize_t>(kPage), "write to a pipe");
  const ssize_t got = read(pipe_[0], target.chunk->At(target.page), kPage);
  Must(got == static_cast<ssize_t>(kPage), "read from a pipe");
  target.chunk->Holds(target.page, number, sequence);
  target.chunk->Check(target.page, "read from a pipe");
  round_.tally->calls.fetch_add(1, std::memory_order_relaxed);
}

void Writer::ReadDatagram() {
  const Target target = Pick(loud_, 1);
  if (target.chunk == nullptr) return;
  uint64_t out[pages::kWords];
  const uint64_t number = target.chunk->first_number + target.page;
  const uint64_t sequence = ++target.chunk->ledger[target.page].sequence;
  pages::Fill(out, number, sequence);
  Must(send(datagrams_[1], out, kPage, 0) == static_cast<ssize_t>(kPage), "send");
  const ssize_t got = recv(datagrams_[0], target.chunk->At(target.page), kPage, MSG_DONTWAIT);
  Must(got == static_cast<ssize_t>(kPage), "recv of a datagram");
  target.chunk->Holds(target.page, number, sequence);
  target.chunk->Check(target.page, "received");
  round_.tally->calls.fetch_add(1, std::memory_order_relaxed);
}

void Writer::ReadRandom() {
  const Target target = Pick(loud_, 1);
  if (target.chunk == nullptr) return;
  uint64_t* at = target.chunk->At(target.page);
  Must(getrandom(at, kPage, 0) == static_cast<ssize_t>(kPage), "getrandom");
  uint64_t copy[pages::kWords];
  std::memcpy(copy, at, kPage);
  for (int i = 0; i < 4; ++i) {
    if (std::memcmp(copy, at, kPage) != 0) Fail("random bytes at %p changed", (void*)at);
  }
  target.chunk->Write(target.page);
  round_.tally->calls.fetch_add(1, std::memory_order_relaxed);
}

// The device writes past the page table, into pages pinned when the call began.
void Writer::ReadDirect() {
  const Target target = Pick(loud_, 8);
  if (target.chunk == nullptr || round_.direct_file < 0) return;
  const size_t first = Below(random_, kDirectPages - target.count + 1);
  const size_t size = target.count * kPage;
  const ssize_t got = pread(round_.direct_file, target.chunk->At(target.page), size,
                            static_cast<off_t>(first * kPage));
  Must(got == static_cast<ssize_t>(size), "O_DIRECT read");
  for (size_t i = 0; i < target.count; ++i) {
    target.chunk->Holds(target.page + i, kDirectNumber + first + i, 1);
    target.chunk->Check(target.page + i, "read with O_DIRECT");
  }
  round_.tally->direct.fetch_add(1, std::memory_order_relaxed);
}

// --- faults of the program's own -----------------------------------------------------------------

void Writer::Probe() {
  // As the JVM's null checks: the first page, which nobody maps.
  auto* null_page = reinterpret_cast<uint64_t*>(uintptr_t{64});  // SAFETY: expected to fault
  if (!Faults(null_page, OneIn(random_, 2))) Fail("the null page can be accessed");
  if (!secret_.empty()) {
    const Target target = Pick(secret_, 1);
    if (target.chunk != nullptr && !Faults(target.chunk->At(target.page), false)) {
      Fail("a page without PROT_READ was read");
    }
  }
  round_.tally->probes.fetch_add(1, std::memory_order_relaxed);
}

void Writer::Sweep() {
  for (Chunk* chunk : all_) {
    const bool secret = (chunk->protection & PROT_READ) == 0;
    if (secret) {
      Must(mprotect(chunk->base, chunk->count() * kPage, PROT_READ) == 0, "mprotect");
    }
    for (size_t page = chunk->reserved; page < chunk->count(); ++page) {
      chunk->Check(page, "in the last sweep");
    }
    if (secret) {
      Must(mprotect(chunk->base, chunk->count() * kPage, chunk->protection) == 0, "mprotect");
    }
  }
}

}  // namespace torture
