// A process in small: a few pages, a few threads, the guards' handlers, and the kernel's part of
// it, each moving one indivisible step at a time, in an order that an Explorer chooses.
//
//   thread   running ─ write, fork, spawn …
//                │ ├─ enters a system call ─ (waits for its event to be read) ─ effect, returns
//                │ ├─ writes to a guarded page ─ fault handler ─ waits ─ tries again
//                │ ├─ faults by itself ─ fault handler ─ (waits for no guard) ─ the program's
//                handler └─── signal ─ freeze handler: acknowledged ─ waits until the window has
//                another
//                     number
//   page     of the image → the process's own (written) → swapped: anonymous
//
// Beside the pages it keeps what a program on plain anonymous memory would see. Any difference, a
// failed system call, or a thread that can never go on, is a violation. Programs in it are free of
// data races: no thread touches what another is giving back.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "explorer.h"

namespace unmoor::interleaving {

constexpr int kMostPages = 3;

struct Op {
  enum class Kind : uint8_t {
    kWrite,        // a store
    kCallWrite,    // read(2) from a pipe: the kernel stores, EFAULT where it may not
    kPinnedWrite,  // a synchronous O_DIRECT read: pinned first, a device stores past the page table
    kGiveBack,     // MADV_DONTNEED
    kFork,         // copies the handlers first, the memory last
    kHandlerWrite,  // a fault of its own, and a store in the program's handler, SIGSEGV blocked
    kSpawn,         // lets the scenario's last thread, unborn until then, begin
  } kind = Kind::kWrite;
  int page = 0;
};

// One safeguard taken out.
enum class Mutation {
  kNone,
  kNoRecheck,
  kRecheckBeforeAllStopped,
  kUnguardBeforeSwap,
  kGivingBackNotAnswered,    // its event is read, nothing else is done
  kThreadsListedOnce,        // one born meanwhile is overlooked
  kThreadsInCallsIgnored,    // a thread inside a system call counts as stopped
  kOwnPagesNotCompared,      // the recheck relies on write protection alone
  kSleepsWithoutLooking,     // a handler waits for a wake-up without comparing first
  kChildKeepsGuard,          // nobody lifts the guard that a forked child inherited
  kBlockersIgnored,          // a guard is put up although a thread has SIGSEGV blocked
  kHandlersBeginUnderGuard,  // a handler of the program's does not wait for the end of a guard
  kForksIgnored,             // the first guard does not wait for forks begun without its handler
};

struct Scenario {
  std::vector<uint8_t> image;  // what each page holds in it; 0: a hole
  std::vector<std::vector<Op>> threads;
  bool last_is_born_late = false;
  bool fault_guard = false;
  bool killer = false;  // the copier may be killed once, at any step; another one takes over
  int give_ups = 1;     // windows in which a thread is not waited for, although it could go on
  int too_dirty = 0;    // windows in which too much was written
  Mutation mutation = Mutation::kNone;
};

struct Killed {};

class Machine {
 public:
  struct Violation {
    std::string what;
  };
  struct Page {
    bool image = true;
    bool own = false;
    uint8_t value = 0;  // where `own`
    bool written = false;
    bool registered = true;
    bool guarded = false;
  };

  Machine(const Scenario& scenario, Explorer& explorer);

  // --- what the copier does with it; each of these ends its step
  void Step(const char* what);  // the others may move before the next one
  // Until done(); false: given up.
  template <class Done>
  bool WaitUntil(Done done) {
    observed_.Mix(0xa17);
    for (;;) {
      Settle();
      if (done()) return true;
      if (!MoveOther()) return false;
    }
  }
  bool ChooseTooDirty();
  void Observe(uint64_t value) { observed_.Mix(value); }

  void OpenWindow();
  void CloseWindow();
  bool SignalNewThreads();  // whether there were any
  [[nodiscard]] bool AllStopped() const;
  // Whether all threads have been stopped since the fault handler was installed.
  [[nodiscard]] bool everybody_passed() const { return everybody_passed_; }
  void InstallHandler() { handler_installed_ = true; }
  void EverybodyPassed() { everybody_passed_ = true; }
  // Nothing is read-only before Guard().
  void RaiseGuard() { raised_ = true; }
  void LowerGuard() { raised_ = false; }
  // Whether some thread has SIGSEGV blocked and does not wait for the end of the guard.
  [[nodiscard]] bool SomebodyBlocksFaults() const;
  void Guard(int page) { pages_[static_cast<size_t>(page)].guarded = true; }
  void Unguard(int page);
  void Replace(int page, bool present, uint8_t value);  // mremap of an anonymous page over it
  void Drop(int page);                                  // fresh anonymous memory, still watched
  [[nodiscard]] bool HasEvent() const { return !events_.empty(); }
  [[nodiscard]] const std::deque<int>& events() const { return events_; }  // threads
  [[nodiscard]] int EventPage() const;
  void ReadEvent();
  void CopierKilled();
  void Unregister();
  void RunThreadsToTheEnd();

  [[nodiscard]] Page& page(int number) { return pages_[static_cast<size_t>(number)]; }
  [[nodiscard]] uint8_t View(int number) const;
  [[nodiscard]] int page_count() const { return static_cast<int>(scenario_.image.size()); }
  [[nodiscard]] const Scenario& scenario() const { return scenario_; }
  // What the copier keeps besides: part of the state.
  std::array<int, kMostPages> mirror{};  // -1: absent
  std::array<bool, kMostPages> dropped{};
  [[nodiscard]] std::string Trace() const;

 private:
  enum class State : uint8_t {
    kUnborn,
    kRunning,
    kInCall,
    kFaulted,          // in the fault handler, about to look at the guard
    kWaitsForPage,     // asleep in it
    kFaultedOwn,       // in the fault handler for a fault of its own, about to look at the guard
    kWaitsForNoGuard,  // asleep in it
    kInOwnHandler,
    kStopped,  // asleep in the freeze handler: acknowledged
    kDone,
  };
  struct Thread {
    State state = State::kRunning;
    size_t next = 0;     // op
    int signal = 0;      // window whose signal is pending
    int stopped_in = 0;  // window
    bool event_read = false;
    bool pin_lost = false;
    bool forks_with_handler = false;
    bool woken = false;
  };
  struct Entry {
    const char* who;
    const char* what;
    int thread;
    int page;
  };

  [[noreturn]] void Fail(const std::string& what);
  void Settle();     // compare, and end the run where this state was before
  bool MoveOther();  // one step of another; false: given up instead
  [[nodiscard]] int Alternatives(const Thread& thread) const;
  void Move(size_t thread, int alternative);
  void BeginOp(size_t thread);
  void EndCall(size_t thread);
  void StoreByProgram(size_t thread, int page);
  void EndFork(const Thread& thread);
  void Finish(Thread& thread);
  [[nodiscard]] const Op& OpOf(const Thread& thread) const;
  [[nodiscard]] uint8_t ValueOf(const Thread& thread) const;
  void Compare();
  [[nodiscard]] uint64_t StateHash() const;
  void Note(const char* who, const char* what, int thread = -1, int page = -1) {
    trace_.push_back({who, what, thread, page});
  }

  const Scenario& scenario_;
  Explorer& explorer_;
  std::vector<Page> pages_;
  std::vector<uint8_t> expected_;
  std::vector<Thread> threads_;
  std::deque<int> events_;
  int window_ = 0;  // 0: closed
  int last_window_ = 0;
  int give_ups_left_;
  int too_dirty_left_;
  bool may_kill_;
  bool handler_installed_ = false;
  bool everybody_passed_ = false;
  bool raised_ = false;
  Hash observed_;
  std::vector<Entry> trace_;
};

}  // namespace unmoor::interleaving
