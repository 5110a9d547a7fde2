// A restore that its command has not finished: what has to go should the command die.
//
// As long as the program does not run: the criu at work and all below it, the tasks it has made,
// the temporary view of its images. From then on: the view. One thread. See agent.h.
#pragma once

#include <span>
#include <string>

#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

class UnfinishedRestore {
 public:
  // `view`: criu's images are in it and its pidfile ("pid"); it may not be there yet.
  explicit UnfinishedRestore(std::string view) : view_(std::move(view)) {}

  [[nodiscard]] const std::string& view() const { return view_; }
  void CriuIs(Pid pid);
  // Ends criu, the tree it has made and those in `tasks`; removes the view.
  void End(std::span<const Pid> tasks);
  // Tried again while somebody still makes files there; nothing where the command has done it.
  void RemoveView() const;

 private:
  std::string view_;
  Pid criu_pid_;
  Fd criu_;
};

}  // namespace unmoor
