// A criu that is started before the images it is to restore are ready, and that says when the tasks
// are.
//
// criu takes some milliseconds until it looks at an image of the tasks: its libraries, the kernel's
// abilities, its own vDSO. None of that depends on what is restored. So it is started first, and
// pstree.img, the first such image, is a pipe in the view: criu waits there until Open() writes the
// tree into it. What criu writes once every task is complete, stopped and no longer traced by it,
// stats-restore, is a pipe too; the end of criu itself need not be waited for then.
//
// In the view the pipes are links to /proc/self/fd/N, and all other ends are closed on exec:
// whoever of us two dies, the other sees its pipe end (criu: a pstree.img without a tree, and
// fails). One thread.
#pragma once

#include <string>
#include <vector>

#include "base/result.h"
#include "os/fd.h"
#include "os/pipe.h"
#include "os/spawn.h"

namespace unmoor::criu {

class Gate {
 public:
  // Puts the links into the empty view, and those to what criu reads before. The pipes will be
  // descriptors `as` and `as` + 1 in criu.
  [[nodiscard]] static Result<Gate> Create(const std::string& criu_directory,
                                           const std::string& view_directory, int as);

  // Whether the view's file of that name is one of the gate's.
  [[nodiscard]] static bool IsPartOf(const std::string& name);

  [[nodiscard]] std::vector<InheritedFd> fds() const;
  // To be called once criu has the descriptors.
  void CriuStarted();
  // The view is complete: criu goes on. A criu that has ended is no error, its end says more.
  [[nodiscard]] Result<> Open();
  // Something can be read here once the tasks are there; never, where criu was told to write its
  // statistics elsewhere.
  [[nodiscard]] int restored() const { return statistics_.reader.get(); }

 private:
  Gate() = default;
  int as_ = -1;
  std::string tree_;
  std::string path_;
  Pipe hold_;
  Pipe statistics_;
};

}  // namespace unmoor::criu
