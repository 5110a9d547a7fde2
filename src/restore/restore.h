// Restore: an image directory runs again, its memory mapped from the layers.
//
// To be mapped, a packed image is first unpacked beside itself (image/pack.h), or was by an earlier
// restore; lazy and eager restores read it as it is (image/layer_source.h).
// Opens and checks manifest and indexes, plans (plan.h), writes a temporary view of CRIU's metadata
// with the mapped VMAs turned into file mappings and the pages of deltas merged with CRIU's own,
// runs `criu restore` so that the tasks stay stopped, hands them to the agent, which puts its
// guards in place and lets them run. The view is removed as soon as criu has ended. A failure
// before the program runs leaves no process, no view and a clear line; criu's log is kept then.
//
// A recorded working set (image/working_set.h) is read ahead from the first moment on (prefetch.h).
//
// Lazy: criu makes the memory anonymous and empty, with a userfaultfd, whose server (the agent)
// brings the pages; nothing is ever mapped from the image.
//
// Eager: criu makes the memory anonymous and empty, and it is filled (fill.h) before anybody runs.
// The agent only sees to it that nothing is left should we die, and lets the tasks run.
//
// The restored root becomes a child of the calling process. One restore at a time in a process.
// Document: docs/architecture.md, docs/cli.md.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agent/agent.h"
#include "base/result.h"
#include "base/units.h"
#include "image/pack.h"
#include "os/fd.h"
#include "os/spawn.h"
#include "restore/choose.h"

namespace unmoor {

struct RestoreOptions {
  std::string directory;
  RestoreMode mode = RestoreMode::kDirect;
  AgentOptions agent;
  std::string pidfile;  // empty: none
  std::optional<std::string> criu;
  std::vector<std::string> criu_arguments;
  bool verbose = false;
  bool prefetch = true;  // the recorded working set, if there is one
  // A working set is going to be recorded: not from what is cached in huge pages, of which a touch
  // maps 2 MiB.
  bool recorded = false;
};

struct RestoreObserver {
  // Of a packed image, before anything else; kDirect only.
  std::function<void(Bytes done, Bytes total)> unpacking;
  std::function<void(Bytes done, Bytes total)> filling;  // kEager only
};

struct RestoreReport {
  RestoreMode mode = RestoreMode::kDirect;
  std::string why_mode;                   // when it was left to us
  std::optional<UnpackedCache> unpacked;  // of a packed image that is mapped: where to, how long
  Pid root;
  std::vector<Pid> tasks;
  std::optional<Pid> agent;
  Bytes mapped;
  Bytes data;
  Bytes loaded;  // of `data`, copied before it ran: the deltas of a chain; eager: all
  uint64_t mappings = 0;
  Nanos criu_time;           // from criu's start until its tasks were ready, or it ended
  Bytes prefetched;          // being read ahead, of a recorded working set
  bool criu_waited = false;  // for us to have its images ready
  Nanos fill_time;           // of an eager restore
  Nanos elapsed;             // until the program ran
};

// The restored program, running. Destroying it lets go of it; the program runs on.
class RestoredProgram {
 public:
  RestoredProgram(RestoreReport report, Fd pidfd, InterruptFd interrupt)
      : report_(std::move(report)), pidfd_(std::move(pidfd)), interrupt_(std::move(interrupt)) {}

  [[nodiscard]] const RestoreReport& report() const { return report_; }
  // Until the root has ended: its exit status as a shell would say it (128 + signal), or nothing
  // when an interrupt (SIGINT, SIGTERM, SIGHUP) came first and the program runs on.
  [[nodiscard]] Result<std::optional<int>> WaitForRoot();

 private:
  RestoreReport report_;
  Fd pidfd_;
  InterruptFd interrupt_;
};

[[nodiscard]] Result<RestoredProgram> Restore(const RestoreOptions& options,
                                              const RestoreObserver& observer);

}  // namespace unmoor
