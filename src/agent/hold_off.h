// Who may be inside a program: its agent, or whoever dumps it, never both.
//
// Two locks (flock) on files of /proc/PID, which end with the program and with their holders,
// however those end:
//   maps     whoever dumps asks for the program
//   pagemap  whoever is inside, or may be at any moment: a worker from before it stops the program
//            until its helper and staging memory are gone, a dump from before criu starts until
//            criu has ended. criu inherits it, so that the death of its starter changes nothing.
// So no agent ever borrows a thread while criu has its own code in the program, or the other way
// round; a thread caught in between would die of the other's breakpoint (SIGTRAP).
//
// An agent asked for its program leaves, keeps the userfaultfd without reading from it, and comes
// back by Inside. A thread that gives memory back meanwhile sleeps until then, so memory is right
// at every moment. An agent that cannot get out just now stays: asking is no order.
//
// Thread-safe as any object. Nothing here is written to disk.
#pragma once

#include <optional>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

// For whoever dumps. Asks for as long as it lives.
class HoldOff {
 public:
  // An error when another command does; errnum ESRCH or ENOENT when the program has ended.
  [[nodiscard]] static Result<HoldOff> Begin(Pid pid);

  // The program for ourselves. False: its agent did not leave within `patience`.
  [[nodiscard]] Result<bool> Await(Nanos patience);
  [[nodiscard]] Pid pid() const { return pid_; }
  // What holds it, for criu to inherit.
  [[nodiscard]] int inside() const { return inside_.get(); }

 private:
  HoldOff(Pid pid, Fd asking, Fd inside)
      : pid_(pid), asking_(std::move(asking)), inside_(std::move(inside)) {}
  Pid pid_;
  Fd asking_;
  Fd inside_;
};

// For the agent.
[[nodiscard]] bool IsHeldOff(Pid pid);

// The right to be inside, as long as it lives.
class Inside {
 public:
  // Nothing: somebody else is inside.
  [[nodiscard]] static Result<std::optional<Inside>> TryEnter(Pid pid);

 private:
  explicit Inside(Fd lock) : lock_(std::move(lock)) {}
  Fd lock_;
};

}  // namespace unmoor
