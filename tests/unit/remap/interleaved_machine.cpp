// See interleaved_machine.h.
#include "interleaved_machine.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace unmoor::interleaving {

namespace {
constexpr int kMostWindows = 12;  // a few are enough in every scenario
}  // namespace

using Kind = Op::Kind;

Machine::Machine(const Scenario& scenario, Explorer& explorer)
    : scenario_(scenario),
      explorer_(explorer),
      pages_(scenario.image.size()),
      expected_(scenario.image),
      threads_(scenario.threads.size()),
      give_ups_left_(scenario.give_ups),
      too_dirty_left_(scenario.too_dirty),
      may_kill_(scenario.killer) {
  mirror.fill(-1);
  if (scenario.last_is_born_late) threads_.back().state = State::kUnborn;
}

// --- the copier's side ---------------------------------------------------------------------------

void Machine::Step(const char* what) {
  observed_.Mix(0x51e9);  // one step further in its program
  for (;;) {
    Settle();
    size_t alternatives = 1;
    for (const Thread& thread : threads_) alternatives += static_cast<size_t>(Alternatives(thread));
    if (may_kill_) ++alternatives;
    size_t choice = explorer_.Choose(alternatives);
    if (choice == 0) {
      Note("copier", what);
      return;
    }
    if (may_kill_ && choice == alternatives - 1) {
      may_kill_ = false;
      Note("killer", "kills the copier");
      throw Killed{};
    }
    --choice;
    for (size_t i = 0; i < threads_.size(); ++i) {
      const auto own = static_cast<size_t>(Alternatives(threads_[i]));
      if (choice < own) {
        Move(i, static_cast<int>(choice));
        break;
      }
      choice -= own;
    }
  }
}

bool Machine::MoveOther() {
  size_t alternatives = 0;
  for (const Thread& thread : threads_) alternatives += static_cast<size_t>(Alternatives(thread));
  const bool must_give_up = alternatives == 0;
  const bool may_give_up = must_give_up || give_ups_left_ > 0;
  size_t choice = explorer_.Choose(alternatives + (may_give_up ? 1 : 0));
  if (choice == alternatives) {
    if (!must_give_up) --give_ups_left_;
    Note("copier", "waits no longer");
    return false;
  }
  for (size_t i = 0; i < threads_.size(); ++i) {
    const auto own = static_cast<size_t>(Alternatives(threads_[i]));
    if (choice < own) {
      Move(i, static_cast<int>(choice));
      return true;
    }
    choice -= own;
  }
  return true;
}

bool Machine::ChooseTooDirty() {
  if (too_dirty_left_ == 0 || explorer_.Choose(2) == 0) return false;
  --too_dirty_left_;
  return true;
}

void Machine::OpenWindow() {
  if (last_window_ == kMostWindows) Fail("some thread waits for ever: no window opens");
  window_ = ++last_window_;
}

void Machine::CloseWindow() {
  window_ = 0;
  for (Thread& thread : threads_) {
    if (thread.state == State::kStopped) thread.woken = true;
  }
}

bool Machine::SignalNewThreads() {
  bool any = false;
  for (Thread& thread : threads_) {
    const bool known = thread.signal == window_ || thread.stopped_in == window_;
    if (thread.state == State::kUnborn || thread.state == State::kDone || known) continue;
    thread.signal = window_;
    any = true;
  }
  return any;
}

bool Machine::AllStopped() const {
  return std::ranges::all_of(threads_, [&](const Thread& thread) {
    if (thread.state == State::kUnborn || thread.state == State::kDone) return true;
    if (thread.state == State::kStopped && thread.stopped_in == window_) return true;
    if (scenario_.mutation == Mutation::kThreadsInCallsIgnored && thread.state == State::kInCall) {
      return true;
    }
    // One that was never signalled is not waited for.
    return thread.signal != window_ && thread.stopped_in != window_;
  });
}

bool Machine::SomebodyBlocksFaults() const {
  return std::ranges::any_of(threads_, [](const Thread& thread) {
    return thread.state == State::kFaulted || thread.state == State::kFaultedOwn ||
           thread.state == State::kInOwnHandler;
  });
}

void Machine::Unguard(int number) {
  page(number).guarded = false;
  for (Thread& thread : threads_) {
    if (thread.state == State::kWaitsForPage && OpOf(thread).page == number) thread.woken = true;
  }
}

void Machine::Replace(int number, bool present, uint8_t value) {
  for (Thread& thread : threads_) {
    const bool pinned = thread.state == State::kInCall && OpOf(thread).kind == Kind::kPinnedWrite;
    if (pinned && OpOf(thread).page == number) thread.pin_lost = true;
  }
  page(number) = {.image = false,
                  .own = present,
                  .value = value,
                  .written = false,
                  .registered = false,
                  .guarded = page(number).guarded};
}

void Machine::Drop(int number) {
  Replace(number, false, 0);
  page(number).registered = true;
}

int Machine::EventPage() const {
  return OpOf(threads_[static_cast<size_t>(events_.front())]).page;
}

void Machine::ReadEvent() {
  threads_[static_cast<size_t>(events_.front())].event_read = true;
  events_.pop_front();
}

// What the kernel does when the process that traces, copies and swaps is gone: every thread it had
// stopped runs again, its staging is forgotten. The userfaultfd lives on in the supervisor.
void Machine::CopierKilled() {
  window_ = 0;
  mirror.fill(-1);
  dropped.fill(false);
  for (Thread& thread : threads_) {
    thread.signal = 0;
    thread.woken = true;
  }
}

void Machine::Unregister() {
  for (Page& page : pages_) page.registered = false;
  while (HasEvent()) ReadEvent();
}

void Machine::RunThreadsToTheEnd() {
  give_ups_left_ = 0;
  if (WaitUntil([&] {
        return std::ranges::all_of(threads_, [](const Thread& thread) {
          return thread.state == State::kDone || thread.state == State::kUnborn;
        });
      })) {
    return;
  }
  Fail("a thread waits for ever");
}

// --- the threads' side ---------------------------------------------------------------------------

const Op& Machine::OpOf(const Thread& thread) const {
  const auto index = static_cast<size_t>(&thread - threads_.data());
  return scenario_.threads[index][thread.next];
}

// Different for every op of every thread.
uint8_t Machine::ValueOf(const Thread& thread) const {
  const auto index = static_cast<size_t>(&thread - threads_.data());
  return static_cast<uint8_t>(100 + index * 20 + thread.next);
}

// In how many ways the thread can go on.
int Machine::Alternatives(const Thread& thread) const {
  const bool careless = scenario_.mutation == Mutation::kSleepsWithoutLooking;
  switch (thread.state) {
    case State::kUnborn:
    case State::kDone:
      return 0;
    case State::kRunning:
      return thread.signal != 0 ? 2 : 1;  // a signal may come a moment later
    case State::kInCall: {
      const bool waits = OpOf(thread).kind == Kind::kGiveBack && !thread.event_read;
      return waits ? 0 : 1;
    }
    case State::kFaulted:
    case State::kFaultedOwn:
    case State::kInOwnHandler:
      return 1;
    case State::kWaitsForNoGuard:
      return raised_ ? 0 : 1;
    case State::kWaitsForPage:
      return (careless ? thread.woken : !pages_[static_cast<size_t>(OpOf(thread).page)].guarded)
                 ? 1
                 : 0;
    case State::kStopped:
      return (careless ? thread.woken : window_ != thread.stopped_in) ? 1 : 0;
  }
  return 0;
}

void Machine::Move(size_t index, int alternative) {
  Thread& thread = threads_[index];
  const auto id = static_cast<int>(index);
  const bool careless = scenario_.mutation == Mutation::kSleepsWithoutLooking;
  switch (thread.state) {
    case State::kRunning:
      if (alternative == 1) {
        Note("thread", "is in the freeze handler", id);
        thread.stopped_in = std::exchange(thread.signal, 0);
        thread.woken = false;
        if (window_ == thread.stopped_in || careless) thread.state = State::kStopped;
        return;
      }
      return BeginOp(index);
    case State::kInCall:
      return EndCall(index);
    case State::kFaulted:
      Note("thread", "looks at the guard", id);
      thread.woken = false;
      thread.state =
          careless || page(OpOf(thread).page).guarded ? State::kWaitsForPage : State::kRunning;
      return;
    case State::kFaultedOwn: {
      Note("thread", "looks for a guard", id);
      const bool waits = raised_ && scenario_.mutation != Mutation::kHandlersBeginUnderGuard;
      thread.state = waits ? State::kWaitsForNoGuard : State::kInOwnHandler;
      return;
    }
    case State::kInOwnHandler:
      Note("thread", "writes in its own handler", id, OpOf(thread).page);
      if (page(OpOf(thread).page).guarded) Fail("killed: a fault with SIGSEGV blocked");
      StoreByProgram(index, OpOf(thread).page);
      thread.state = State::kRunning;
      return Finish(thread);
    case State::kWaitsForNoGuard:
      Note("thread", "looks again", id);
      thread.state = State::kFaultedOwn;
      return;
    case State::kWaitsForPage:
    case State::kStopped:
      Note("thread", "goes on", id);
      thread.state = State::kRunning;
      return;
    case State::kUnborn:
    case State::kDone:
      return;
  }
}

void Machine::BeginOp(size_t index) {
  Thread& thread = threads_[index];
  const auto id = static_cast<int>(index);
  const Op op = OpOf(thread);
  switch (op.kind) {
    case Kind::kWrite:
      if (page(op.page).guarded) {
        Note("thread", "faults on", id, op.page);
        thread.state = State::kFaulted;
        return;
      }
      Note("thread", "writes", id, op.page);
      StoreByProgram(index, op.page);
      return Finish(thread);
    case Kind::kCallWrite:
      Note("thread", "enters a call that will write", id, op.page);
      thread.state = State::kInCall;
      return;
    case Kind::kPinnedWrite: {
      Note("thread", "pins", id, op.page);
      if (page(op.page).guarded) Fail("EFAULT: a system call may not pin a guarded page");
      Page& target = page(op.page);
      if (!target.own)
        target = {.image = target.image,
                  .own = true,
                  .value = View(op.page),
                  .written = true,
                  .registered = target.registered};
      target.written = true;
      thread.state = State::kInCall;
      thread.pin_lost = false;
      return;
    }
    case Kind::kGiveBack:
      Note("thread", "gives back", id, op.page);
      thread.state = State::kInCall;
      thread.event_read = !page(op.page).registered;
      if (!thread.event_read) events_.push_back(id);
      return;
    case Kind::kFork:
      Note("thread", "enters fork", id);
      thread.state = State::kInCall;
      thread.forks_with_handler = handler_installed_;
      return;
    case Kind::kHandlerWrite:
      Note("thread", "faults by itself", id);
      thread.state = State::kFaultedOwn;
      return;
    case Kind::kSpawn:
      Note("thread", "lets the last thread begin", id);
      threads_.back().state = State::kRunning;
      return Finish(thread);
  }
}

void Machine::EndCall(size_t index) {
  Thread& thread = threads_[index];
  const auto id = static_cast<int>(index);
  const Op op = OpOf(thread);
  if (op.kind == Kind::kGiveBack) {
    Note("thread", "has given back", id, op.page);
    Page& target = page(op.page);
    target.own = false;
    target.written = false;
    expected_[static_cast<size_t>(op.page)] = 0;
  } else if (op.kind == Kind::kCallWrite) {
    Note("thread", "writes inside its call", id, op.page);
    if (page(op.page).guarded) Fail("EFAULT: a system call may not write to a guarded page");
    StoreByProgram(index, op.page);
  } else if (op.kind == Kind::kFork) {
    Note("thread", "has forked", id);
    EndFork(thread);
  } else {
    Note("device", "writes for thread", id, op.page);
    expected_[static_cast<size_t>(op.page)] = ValueOf(thread);
    if (!thread.pin_lost) page(op.page).value = ValueOf(thread);  // no fault: not seen as written
  }
  thread.state = State::kRunning;
  Finish(thread);
}

void Machine::StoreByProgram(size_t index, int number) {
  Page& target = page(number);
  target.own = true;
  target.written = true;
  target.value = expected_[static_cast<size_t>(number)] = ValueOf(threads_[index]);
}

// The child has the pages as they are at this moment, and no remapper.
void Machine::EndFork(const Thread& thread) {
  Compare();
  const bool guarded = std::ranges::any_of(pages_, [](const Page& page) { return page.guarded; });
  if (guarded && scenario_.mutation == Mutation::kChildKeepsGuard) {
    Fail("a forked child can never write to a page again");
  }
  if (guarded && !thread.forks_with_handler) {
    Fail("a forked child has a guard and no handler for it");
  }
}

void Machine::Finish(Thread& thread) {
  const auto index = static_cast<size_t>(&thread - threads_.data());
  if (++thread.next == scenario_.threads[index].size()) {
    thread.state = State::kDone;
    thread.signal = 0;
  }
}

// --- checking ------------------------------------------------------------------------------------

uint8_t Machine::View(int number) const {
  const auto index = static_cast<size_t>(number);
  if (pages_[index].own) return pages_[index].value;
  return pages_[index].image ? scenario_.image[index] : uint8_t{0};
}

void Machine::Compare() {
  for (int i = 0; i < page_count(); ++i) {
    const bool between = std::ranges::any_of(threads_, [&](const Thread& thread) {
      return thread.state == State::kInCall && OpOf(thread).kind == Kind::kGiveBack &&
             OpOf(thread).page == i;
    });
    const uint8_t expected = expected_[static_cast<size_t>(i)];
    if (!between && View(i) != expected) {
      Fail(fmt::format("page {} reads {} instead of {}", i, View(i), expected));
    }
  }
}

void Machine::Settle() {
  Compare();
  explorer_.Visit(StateHash());
}

uint64_t Machine::StateHash() const {
  Hash hash = observed_;
  for (size_t i = 0; i < pages_.size(); ++i) {
    const Page& p = pages_[i];
    hash.Mix(p.image, p.own, p.own ? p.value : 0, p.written, p.registered, p.guarded, expected_[i],
             mirror[i] + 1, dropped[i]);
  }
  for (const Thread& t : threads_) {
    // A window other than the present one is as good as none.
    hash.Mix(t.state, t.next,
             t.signal == 0         ? 0
             : t.signal == window_ ? 1
                                   : 2,
             t.state == State::kStopped && t.stopped_in == window_, t.event_read, t.pin_lost,
             t.woken, t.forks_with_handler);
    hash.Mix(t.stopped_in == window_ && window_ != 0);
  }
  for (const int event : events_) hash.Mix(event);
  hash.Mix(events_.size(), window_ != 0, give_ups_left_, too_dirty_left_, may_kill_);
  hash.Mix(handler_installed_, everybody_passed_, raised_);
  return hash.value();
}

void Machine::Fail(const std::string& what) {
  throw Violation{what + Trace()};
}

std::string Machine::Trace() const {
  std::string text;
  for (const Entry& entry : trace_) {
    text += fmt::format("\n  {}", entry.who);
    if (entry.thread >= 0) text += fmt::format(" {}", entry.thread);
    text += fmt::format(" {}", entry.what);
    if (entry.page >= 0) text += fmt::format(" page {}", entry.page);
  }
  return text;
}

}  // namespace unmoor::interleaving
