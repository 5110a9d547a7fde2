// See ptrace.h.
#include "os/ptrace.h"

#include <elf.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "os/backoff.h"
#include "os/process_control.h"
#include "os/procfs.h"
#include "os/remote_memory.h"

namespace unmoor {
namespace {

constexpr int kGetSigmask = 0x420a;
constexpr int kSetSigmask = 0x420b;
constexpr int kGetRseqConfiguration = 0x420f;
constexpr Nanos kStopLimit(2'000'000'000);
constexpr Nanos kSwallowLimit(200'000'000);

// SAFETY: every ptrace call of this file goes through here; `data` is a number or points to the
// structure that the request names.
long Ptrace(int request, Pid thread, uint64_t address, void* data) {
  return ::ptrace(static_cast<__ptrace_request>(request), thread.value, address, data);
}

Failure PtraceError(int errnum, const char* what, Pid thread) {
  return SystemError(errnum, fmt::format("cannot {} thread {}", what, thread.value));
}

// Its next stop or its end, as waitpid tells them. 0: it has ended, which waitpid does not tell
// yet.
//
// A leader's end is told only once all of its threads are gone; those of them that are traced too,
// and were killed with it, wait for us to ask. So nobody is waited for alone.
pid_t AwaitChange(Pid thread, int& status) {
  for (;;) {
    const pid_t waited = ::waitpid(thread.value, &status, __WALL | WNOHANG);
    if (waited != 0) return waited;
    siginfo_t first{};
    const int found = ::waitid(P_ALL, 0, &first, WEXITED | WSTOPPED | __WALL | WNOWAIT);
    if (found != 0 || first.si_pid == thread.value) continue;
    const auto process = ReadProcess(thread);
    if (!process || process->ended()) return 0;
  }
}

}  // namespace

Result<StoppedThread> StoppedThread::Seize(Pid thread) {
  constexpr uintptr_t kOptions = PTRACE_O_TRACESYSGOOD;
  if (Ptrace(PTRACE_SEIZE, thread, 0, reinterpret_cast<void*>(kOptions)) != 0) {
    return PtraceError(errno, "trace", thread);
  }
  StoppedThread stopped(thread);
  if (Ptrace(PTRACE_INTERRUPT, thread, 0, nullptr) != 0) {
    return PtraceError(errno, "stop", thread);
  }
  return stopped;
}

StoppedThread::StoppedThread(StoppedThread&& other) noexcept {
  *this = std::move(other);
}

StoppedThread& StoppedThread::operator=(StoppedThread&& other) noexcept {
  if (this != &other) {
    Detach();
    thread_ = std::exchange(other.thread_, Pid{});
    stopped_ = other.stopped_;
    signal_ = other.signal_;
    requeue_ = std::exchange(other.requeue_, 0);
    remote_ = std::exchange(other.remote_, false);
    saved_ = other.saved_;
    saved_mask_ = other.saved_mask_;
  }
  return *this;
}

StoppedThread::~StoppedThread() {
  Detach();
}

StoppedThread::State StoppedThread::Poll() {
  if (thread_.value == 0) return State::kGone;
  if (stopped_) return State::kStopped;
  int status = 0;
  const pid_t waited = ::waitpid(thread_.value, &status, __WALL | WNOHANG);
  if (waited == 0) return State::kRunning;
  if (waited < 0 || !WIFSTOPPED(status)) {
    thread_ = Pid{};
    return State::kGone;
  }
  stopped_ = true;
  signal_ = (status >> 16) != 0 ? 0 : WSTOPSIG(status);
  return State::kStopped;
}

Result<user_regs_struct> StoppedThread::Registers() const {
  user_regs_struct registers{};
  if (Ptrace(PTRACE_GETREGS, thread_, 0, &registers) != 0) {
    return PtraceError(errno, "read registers of", thread_);
  }
  return registers;
}

bool StoppedThread::InSystemCall(const user_regs_struct& registers) {
  return static_cast<int64_t>(registers.orig_rax) >= 0;
}

// What the thread's registers must be to go on right even if we are killed now and the kernel
// releases it outside its own restart logic: an interrupted system call is made again, as the
// kernel would, or returns EINTR where only the kernel could continue it (restart_syscall).
user_regs_struct StoppedThread::AbandonRegisters() const {
  constexpr int64_t kRestartSys = -512, kRestartNoIntr = -513, kRestartNoHand = -514,
                    kRestartBlock = -516;
  user_regs_struct registers = saved_;
  if (!InSystemCall(saved_)) return registers;
  switch (static_cast<int64_t>(saved_.rax)) {
    case kRestartSys:
    case kRestartNoIntr:
    case kRestartNoHand:
      registers.rax = saved_.orig_rax;
      registers.rip -= 2;  // the length of `syscall`
      break;
    case kRestartBlock:
      registers.rax = static_cast<uint64_t>(-EINTR);
      break;
    default:
      break;
  }
  registers.orig_rax = ~uint64_t{0};
  return registers;
}

Result<> StoppedThread::BeginRemote() {
  UNMOOR_CHECK(stopped_ && !remote_);
  UNMOOR_ASSIGN(saved_, Registers());
  constexpr uint64_t kCode64 = 0x33;
  if (saved_.cs != kCode64) return MachineError("32-bit programs are not supported");
  if (Ptrace(kGetSigmask, thread_, sizeof(saved_mask_), &saved_mask_) != 0) {
    return PtraceError(errno, "read signal mask of", thread_);
  }
  remote_ = true;
  return {};
}

// Resumes by `request` and waits for the next stop; with PTRACE_SYSCALL, for the next one at a
// system call (a thread stopped by SIGSTOP shows that stop once more first).
Result<> StoppedThread::ContinueToStop(int request) {
  for (;;) {
    if (Ptrace(request, thread_, 0, nullptr) != 0) return PtraceError(errno, "resume", thread_);
    int status = 0;
    const pid_t waited = AwaitChange(thread_, status);
    if (waited <= 0 || !WIFSTOPPED(status)) {
      if (waited != 0) thread_ = Pid{};
      remote_ = stopped_ = false;
      return Failure(Error(ErrorKind::kMachine, ESRCH, "the program ended meanwhile"));
    }
    constexpr int kSystemCallStop = SIGTRAP | 0x80;
    const int signal = WSTOPSIG(status);
    if (signal == kSystemCallStop) return {};
    const bool delivery = (status >> 16) == 0;
    if (delivery && (signal == SIGSEGV || signal == SIGILL || signal == SIGBUS)) {
      return MachineError("a borrowed thread failed with signal {}", signal);
    }
    if (delivery) requeue_ = signal;  // only SIGSTOP cannot be held back
    if (request != PTRACE_SYSCALL) return {};
  }
}

Result<int64_t> StoppedThread::RunRemote(Vaddr instruction, uint64_t number,
                                         std::array<uint64_t, 6> args, std::optional<Vaddr> stack) {
  UNMOOR_CHECK(remote_);
  user_regs_struct registers = saved_;
  registers.rip = instruction.value;
  registers.rax = number;
  registers.orig_rax = ~uint64_t{0};  // not in a system call: nothing to restart
  registers.rdi = args[0];
  registers.rsi = args[1];
  registers.rdx = args[2];
  registers.r10 = args[3];
  registers.r8 = args[4];
  registers.r9 = args[5];
  if (stack) registers.rsp = stack->value;
  uint64_t all = ~uint64_t{0};
  if (Ptrace(kSetSigmask, thread_, sizeof(all), &all) != 0) {
    return PtraceError(errno, "block signals of", thread_);
  }
  if (Ptrace(PTRACE_SETREGS, thread_, 0, &registers) != 0) {
    return PtraceError(errno, "set registers of", thread_);
  }
  UNMOOR_TRY(ContinueToStop(PTRACE_SYSCALL));  // at its entry
  UNMOOR_TRY(ContinueToStop(PTRACE_SYSCALL));  // at its exit
  UNMOOR_ASSIGN(registers, Registers());
  const auto result = static_cast<int64_t>(registers.rax);
  registers = AbandonRegisters();
  if (Ptrace(PTRACE_SETREGS, thread_, 0, &registers) != 0 ||
      Ptrace(kSetSigmask, thread_, sizeof(saved_mask_), &saved_mask_) != 0) {
    return PtraceError(errno, "restore registers of", thread_);
  }
  return result;
}

Result<> StoppedThread::EndRemote() {
  if (!remote_) return {};
  remote_ = false;
  if (!InSystemCall(saved_)) return {};  // RunRemote has restored everything
  // Back into a stop of the kind we found it in, before any instruction runs, so that the kernel's
  // own logic restarts a system call that our first stop interrupted.
  if (Ptrace(PTRACE_INTERRUPT, thread_, 0, nullptr) != 0) {
    return PtraceError(errno, "stop", thread_);
  }
  UNMOOR_TRY(ContinueToStop(PTRACE_CONT));
  if (Ptrace(PTRACE_SETREGS, thread_, 0, &saved_) != 0 ||
      Ptrace(kSetSigmask, thread_, sizeof(saved_mask_), &saved_mask_) != 0) {
    return PtraceError(errno, "restore registers of", thread_);
  }
  return {};
}

bool StoppedThread::InRestartableSequence() const {
  struct {
    uint64_t pointer;
    uint32_t size, signature, flags, padding;
  } configuration{};
  if (Ptrace(kGetRseqConfiguration, thread_, sizeof(configuration), &configuration) <= 0 ||
      configuration.pointer == 0) {
    return false;
  }
  uint64_t critical_section = 0;
  const auto bytes = std::as_writable_bytes(std::span(&critical_section, 1));
  if (!ReadMemory(thread_, Vaddr(configuration.pointer + 8), bytes)) return false;
  return critical_section != 0;
}

StoppedThread::State StoppedThread::AwaitStop(Nanos limit) {
  const Nanos began = MonotonicNow();
  State state = Poll();
  while (state == State::kRunning && MonotonicNow() - began < limit) {
    SleepFor(Nanos(20'000));
    state = Poll();
  }
  return state;
}

void StoppedThread::Detach() {
  if (thread_.value == 0) return;
  if (remote_) (void)EndRemote();
  AwaitStop(kStopLimit);
  if (thread_.value == 0) return;
  const auto signal = static_cast<uintptr_t>(signal_);
  if (Ptrace(PTRACE_DETACH, thread_, 0, reinterpret_cast<void*>(signal)) != 0 && errno == ESRCH) {
    stopped_ = false;  // killed; nobody else learns of its end before we do
    AwaitStop(kSwallowLimit);
    thread_ = Pid{};
    return;
  }
  if (requeue_ != 0) (void)::kill(thread_.value, std::exchange(requeue_, 0));
  thread_ = Pid{};
}

Result<> StoppedThread::SwallowContinue() {
  uint64_t mask = 0;
  if (Ptrace(kGetSigmask, thread_, sizeof(mask), &mask) != 0) {
    return PtraceError(errno, "read signal mask of", thread_);
  }
  uint64_t open_mask = mask & ~SignalBit(SIGCONT);
  Ptrace(kSetSigmask, thread_, sizeof(open_mask), &open_mask);
  if (::kill(thread_.value, SIGCONT) != 0) return PtraceError(errno, "continue", thread_);
  for (int stops = 0; stops < 16; ++stops) {
    int status = 0;
    Ptrace(PTRACE_CONT, thread_, 0, reinterpret_cast<void*>(static_cast<uintptr_t>(signal_)));
    signal_ = 0;
    stopped_ = false;
    pid_t waited = 0;
    const Nanos began = MonotonicNow();
    while ((waited = ::waitpid(thread_.value, &status, __WALL | WNOHANG)) == 0 &&
           MonotonicNow() - began < kSwallowLimit) {
      SleepFor(Nanos(20'000));
    }
    if (waited == 0) {  // another thread took it
      if (Ptrace(PTRACE_INTERRUPT, thread_, 0, nullptr) != 0) {
        return PtraceError(errno, "stop", thread_);
      }
      Ptrace(kSetSigmask, thread_, sizeof(mask), &mask);
      return {};
    }
    if (waited < 0 || !WIFSTOPPED(status)) {
      thread_ = Pid{};
      return Failure(Error(ErrorKind::kMachine, ESRCH, "the program ended meanwhile"));
    }
    stopped_ = true;
    signal_ = (status >> 16) != 0 ? 0 : WSTOPSIG(status);
    if (signal_ == SIGCONT) break;
  }
  signal_ = 0;
  Ptrace(kSetSigmask, thread_, sizeof(mask), &mask);
  return {};
}

// True when it found threads it had not seized yet.
Result<bool> ProgramStop::SeizeNew() {
  bool found = false;
  UNMOOR_ASSIGN(const std::vector<Pid> listed, ReadThreads(pid_));
  for (const Pid thread : listed) {
    const auto same = [&](const StoppedThread& s) { return s.thread() == thread; };
    if (std::ranges::any_of(threads_, same)) continue;
    auto seized = StoppedThread::Seize(thread);
    if (!seized && seized.error().errnum() == ESRCH) continue;
    if (!seized && seized.error().errnum() == EPERM) {
      const auto info = ReadProcess(thread);  // an ended leader stays listed and cannot be traced
      if (info && info->ended()) zombie_ = thread;
      if (!info || info->ended()) continue;
      const auto tracer = ReadProcess(info->tracer);
      if (tracer && tracer->name.starts_with("unmoor")) {
        return Failure(Error(ErrorKind::kMachine, EAGAIN, "another agent is just beginning"));
      }
    }
    if (!seized) return Failure(std::move(seized).error());
    threads_.push_back(std::move(*seized));
    found = true;
  }
  return found;
}

// Whether there is no thread but the seized ones, which each stay until they have been waited for.
// A list alone does not tell: see CountThreads.
bool ProgramStop::IsComplete() const {
  const auto count = CountThreads(pid_);
  const auto ended = [this] {
    const auto zombie = ReadProcess(zombie_);
    return zombie && zombie->ended();
  };
  return count && *count == threads_.size() + (zombie_.value != 0 && ended() ? 1 : 0);
}

Result<> ProgramStop::Stop(Nanos limit, const std::function<Result<bool>()>& on_late) {
  Nanos began = MonotonicNow();
  int idle = 0;
  for (;;) {
    UNMOOR_ASSIGN(const bool found, SeizeNew());
    std::erase_if(threads_,
                  [](StoppedThread& s) { return s.Poll() == StoppedThread::State::kGone; });
    const auto late = std::ranges::find_if(
        threads_, [](StoppedThread& s) { return s.Poll() == StoppedThread::State::kRunning; });
    const bool all_known = IsComplete();
    if (all_known && late == threads_.end()) break;
    if (found) continue;
    if (MonotonicNow() - began > limit) {
      const Pid thread = late == threads_.end() ? pid_ : late->thread();
      return Failure(Error(ErrorKind::kMachine, EAGAIN,
                           fmt::format("thread {} of process {} does not stop (in a slow disk "
                                       "transfer, or a long vfork?)",
                                       thread.value, pid_.value)));
    }
    // Every thread there is has been asked; those that are late sleep in the kernel.
    if (all_known && on_late) {
      UNMOOR_ASSIGN(const bool lets_go_on, on_late());
      if (lets_go_on) began = MonotonicNow();
    }
    WaitALittle(idle++);
  }
  if (threads_.empty()) {
    return Failure(Error(ErrorKind::kMachine, ESRCH, fmt::format("process {} ended", pid_.value)));
  }
  return {};
}

// From the last to the leader, whose end is told after theirs.
void ProgramStop::Release() {
  for (size_t i = threads_.size(); i-- > 0;) {
    const auto at = threads_.begin() + static_cast<ptrdiff_t>(i);
    if (at->Poll() != StoppedThread::State::kRunning) threads_.erase(at);
  }
}

namespace {

// The signal masks of /proc/PID/status that tell whether a plain SIGCONT would be noticed.
Result<bool> WouldNoticeContinue(Pid pid) {
  UNMOOR_ASSIGN(const SignalSets sets, ReadSignalSets(pid));
  return ((sets.caught | sets.blocked) & SignalBit(SIGCONT)) != 0;
}

}  // namespace

Result<> ContinueUnnoticed(Pid pid) {
  UNMOOR_ASSIGN(const bool notices, WouldNoticeContinue(pid));
  if (!notices) {
    if (::kill(pid.value, SIGCONT) != 0) return PtraceError(errno, "continue", pid);
    return {};
  }
  // Take the signal away at the moment of its delivery to the main thread.
  UNMOOR_ASSIGN(StoppedThread main_thread, StoppedThread::Seize(pid));
  if (main_thread.AwaitStop(kStopLimit) == StoppedThread::State::kRunning) {
    return MachineError("process {} does not stop", pid.value);
  }
  return main_thread.SwallowContinue();
}

}  // namespace unmoor
