// The agent: the remap carried into other processes, from outside, in the background.
//
// One supervisor process for each restore or remap, one worker process for each task (address
// space), one helper (CLONE_VM, injected) inside each program while its worker is at work. The
// supervisor holds every worker's userfaultfd a second time, so that the death of one worker leaves
// the program with right memory and the next worker goes on. All end themselves when the program is
// READY.
//
// Progress is kept in a file for each process, RuntimeDirectory()/<pid>.json, which `status` reads;
// the truth is always derived from /proc/PID/maps.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "os/daemon.h"
#include "os/fd.h"

namespace unmoor {

struct LazyImage;

enum class ThpPolicy {
  kAuto,   // 2 MiB blocks whose pages are all present get a huge page, unless the system says never
  kNever,  // 4 KiB pages only
};

enum class GuardPolicy {
  kFreeze,  // every thread stands still for a whole window
  kFault,   // threads in user mode run on until they write to the window or make a system call
};

// Whether `policy` and the system allow them.
[[nodiscard]] bool MayUseHugePages(ThpPolicy policy);

struct AgentOptions {
  Nanos max_pause{1'000'000};  // bound of one window
  GuardPolicy guard = GuardPolicy::kFreeze;
  ThpPolicy thp = ThpPolicy::kAuto;
  bool remap = true;                 // false: keep anonymous semantics only (restore --remap off)
  Nanos child_delay{5'000'000'000};  // a forked child is remapped once it has lived this long
  bool verify = true;                // hold what is copied of a layer against its hashes
  std::string log_file;              // where the detached agent logs; empty: nowhere
};

// What a finished or running remap did. All counts are of this process since its agent began.
struct RemapReport {
  Bytes total;           // direct-mapped bytes with content when it began
  Bytes done;            // of these, anonymous now
  Bytes dropped;         // given back by the program meanwhile (munmap, MADV_DONTNEED)
  uint64_t windows = 0;  // freeze windows that swapped something
  uint64_t guarded = 0;  // of these, windows in which threads ran on (guard kFault)
  uint64_t aborted = 0;  // windows given up (a thread would not stop, too much was written)
  Nanos longest_pause;   // first thread asked to stop until last thread released
  Nanos elapsed;         // since its remap began
  Bytes verified;        // of the bytes copied from layers, held against their hashes
  double copy_rate = 0;  // bytes a second, copying and swapping only
};

enum class Status { kReady = 0, kLater = 1, kNever = 2 };  // also the exit codes of `unmoor status`

struct ProcessStatus {
  Status status = Status::kReady;
  std::string reason;               // for kLater and kNever: one clear line
  Bytes direct_mapped;              // address space still mapping a page image
  Bytes direct_mapped_data;         // of which the image holds data
  std::vector<std::string> images;  // the page images still mapped
  Bytes lazy;  // address space whose pages somebody unknown still brings, by a userfaultfd
  std::optional<Pid> agent;  // the agent at work, if any
  std::optional<RemapReport> progress;
};

// Where agents keep their progress: $UNMOOR_RUNTIME_DIR, else /run/unmoor, else /tmp/unmoor-<uid>.
[[nodiscard]] std::string RuntimeDirectory();

// For `restore`: an agent that is started before its program, so that it is ready when the program
// is. The tasks are stopped (criu --leave-stopped, SIGSTOP). Destroyed before LetRun, or killed
// with its maker, it leaves nothing: no agent, and in the second case none of the restored tasks
// either.
class WaitingAgent {
 public:
  // `view`: the directory of criu's images, which need not exist yet,
  // where criu's pidfile will be "pid"; removed should we die. Call it with one thread only, and
  // not as a subreaper. Returns before the agent is up: Started() waits for that.
  [[nodiscard]] static Result<WaitingAgent> Begin(const AgentOptions& options,
                                                  const std::string& view);
  // The same for `criu restore --lazy-pages`: a server of the memory, which must not change before
  // it has been let go of.
  [[nodiscard]] static Result<WaitingAgent> BeginLazy(const LazyImage& image,
                                                      const AgentOptions& options,
                                                      const std::string& view);
  WaitingAgent(WaitingAgent&&) noexcept = default;
  WaitingAgent& operator=(WaitingAgent&&) = delete;
  ~WaitingAgent();

  // It is no child of ours any more. To be called before BecomeSubreaper.
  [[nodiscard]] Result<> Started();
  // Should we die from here on, `criu` and all below it is ended.
  [[nodiscard]] Result<> Guard(Pid criu);
  // So many tasks will probably come: so many workers are made ready.
  // Lazy: criu will connect to `listener`.
  [[nodiscard]] Result<> Expect(size_t tasks, int listener = -1);
  // Puts the guards in place, in the background; those in `stay_stopped` will not be let run.
  [[nodiscard]] Result<> Adopt(const std::vector<Pid>& tasks, const std::vector<Pid>& stay_stopped);
  // What was adopted is to run once all of it is guarded. Does not wait for that. None of the
  // program's signal handlers, nor its job-control state, will notice.
  [[nodiscard]] Result<> LetRun();
  // Once it runs, and `status` knows of it. Returns the agent's pid. When something cannot be
  // guarded, nothing was resumed.
  [[nodiscard]] Result<Pid> AwaitRunning();
  // Why it has given up, if it has said so; for when criu has failed.
  [[nodiscard]] std::optional<std::string> WhatFailed();

 private:
  WaitingAgent(Fd socket, StartingDaemon process);

  Fd socket_;  // empty: it has been let go of
  std::unique_ptr<StartingDaemon> process_;
  Pid pid_;
  std::vector<Pid> tasks_;
};

// For `remap -t PID`: remaps every direct-mapped VMA of the running (or stopped) process `pid`, in
// the foreground. `progress` is called a few times a second from the calling thread; it may be
// empty. Takes over from a dead agent. An agent at work on that process is waited for instead.
[[nodiscard]] Result<RemapReport> RemapProcess(
    Pid pid, const AgentOptions& options, const std::function<void(const RemapReport&)>& progress);

// Derived from /proc/PID: right for any process, whoever mapped it.
[[nodiscard]] Result<ProcessStatus> QueryStatus(Pid pid);

// Why unmoor ended the process that had this id last: a page of it could not be brought (lazy
// restore). Nothing when it did not.
[[nodiscard]] std::optional<std::string> WhyEnded(Pid pid);

// Blocks until `pid` is READY (or NEVER), at most `timeout` (negative: for ever).
[[nodiscard]] Result<ProcessStatus> WaitReady(
    Pid pid, Nanos timeout, const std::function<void(const ProcessStatus&)>& progress);

}  // namespace unmoor
