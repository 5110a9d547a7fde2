// Stopping other processes' threads, and making one of them run a system call.
//
// A StoppedThread is seized (PTRACE_SEIZE) and stopped; its destructor restores what was changed
// and detaches it, so the thread goes on as if nothing had happened. All calls on one StoppedThread
// must come from the thread that seized it (a rule of ptrace). Source: ptrace(2), signal(7).
#pragma once

#include <sys/user.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

class StoppedThread {
 public:
  // Asks the thread to stop; WaitStopped says when it has. errnum ESRCH: it ended.
  [[nodiscard]] static Result<StoppedThread> Seize(Pid thread);
  StoppedThread(StoppedThread&& other) noexcept;
  StoppedThread& operator=(StoppedThread&& other) noexcept;
  StoppedThread(const StoppedThread&) = delete;
  StoppedThread& operator=(const StoppedThread&) = delete;
  ~StoppedThread();

  enum class State { kRunning, kStopped, kGone };
  // Looks without waiting.
  [[nodiscard]] State Poll();
  // Looks until it is not running any more, or the limit is over.
  State AwaitStop(Nanos limit);

  [[nodiscard]] Pid thread() const { return thread_; }
  [[nodiscard]] Result<user_regs_struct> Registers() const;
  // True when the thread was stopped inside a system call.
  [[nodiscard]] static bool InSystemCall(const user_regs_struct& registers);

  // Runs one system call at `instruction` (the address of a `syscall` instruction mapped executable
  // in that process) and returns what it returned (negative errno included). Signals to the thread
  // are held back until End. Begin once, Run any number of times, End once.
  [[nodiscard]] Result<> BeginRemote();
  [[nodiscard]] Result<int64_t> RunRemote(Vaddr instruction, uint64_t number,
                                          std::array<uint64_t, 6> args,
                                          std::optional<Vaddr> stack = std::nullopt);
  [[nodiscard]] Result<> EndRemote();

  // A signal is about to be delivered to it (and will be, on detach).
  [[nodiscard]] bool has_signal() const { return signal_ != 0; }
  // True when the thread is in a restartable sequence that our changing its registers would let
  // go on although it was interrupted. Source: rseq(2).
  [[nodiscard]] bool InRestartableSequence() const;

  // Of a process stopped by SIGSTOP, its main thread: sends SIGCONT and takes it away again at the
  // moment of delivery. The thread stays stopped for us; Detach lets it run.
  [[nodiscard]] Result<> SwallowContinue();

  // Releases it now. A signal that was about to be delivered is delivered.
  void Detach();

 private:
  explicit StoppedThread(Pid thread) : thread_(thread) {}
  [[nodiscard]] Result<> ContinueToStop(int request);
  [[nodiscard]] user_regs_struct AbandonRegisters() const;

  Pid thread_;  // 0: moved from or detached
  bool stopped_ = false;
  int signal_ = 0;   // to be delivered on detach
  int requeue_ = 0;  // came while the thread was borrowed; sent again after detaching
  bool remote_ = false;
  user_regs_struct saved_{};
  uint64_t saved_mask_ = 0;
};

// All threads of one process, stopped together. Threads that do not stop in time stay asked to;
// they are released when they do (Release, again and again, or the end of our process).
class ProgramStop {
 public:
  explicit ProgramStop(Pid pid) : pid_(pid) {}
  ProgramStop(const ProgramStop&) = delete;
  ProgramStop& operator=(const ProgramStop&) = delete;
  ~ProgramStop() { Release(); }

  // `on_late` is called again and again while some thread does not stop (it sleeps where ptrace
  // cannot reach it); it may do what lets that thread go on, and says whether it did (the limit
  // then begins anew). errnum EAGAIN: not within `limit`; the others stay stopped until Release.
  // errnum ESRCH: the process ended.
  [[nodiscard]] Result<> Stop(Nanos limit, const std::function<Result<bool>()>& on_late);
  void Release();
  [[nodiscard]] std::span<StoppedThread> threads() { return threads_; }

 private:
  [[nodiscard]] Result<bool> SeizeNew();
  [[nodiscard]] bool IsComplete() const;
  Pid pid_;
  std::vector<StoppedThread> threads_;
  Pid zombie_;  // one that has ended, and stays listed
};

// Lets a process stopped by SIGSTOP run again without any of its signal handlers, or its pending
// signals, showing the SIGCONT that it takes.
[[nodiscard]] Result<> ContinueUnnoticed(Pid pid);

}  // namespace unmoor
