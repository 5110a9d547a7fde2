// Dump: a running process and its children become an image directory, or nothing changes.
//
// Checks what the user asked for, finishes a pending remap unless the program can be dumped as it
// is (still_mapped.h), runs `criu dump` with ourselves as its page server (page_router.h), compares
// CRIU's metadata with our plan, writes the manifest and publishes. Where it was asked for, the
// memory is written before the program is frozen (write_ahead.h). After a parent (parent.h) only
// what differs is written; the parent's layers are linked into the new directory before the program
// is touched, and those not needed removed at the end. Whatever fails before criu has exited with
// 0, the program runs on as if nothing had happened and no directory is left; what fails after it
// (the program may be gone) keeps the complete data and says where.
//
// One dump per process at a time; it starts threads. Document: docs/architecture.md, docs/cli.md.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "agent/agent.h"
#include "base/result.h"
#include "base/units.h"
#include "checkpoint/plan.h"
#include "image/compression.h"
#include "image/manifest.h"

namespace unmoor {

struct CheckpointOptions {
  Pid pid;
  std::string directory;
  bool leave_running = false;
  Nanos remap_timeout{-1};  // how long to wait for a pending remap; negative: for ever
  // The checkpoint to write only the differences from; it must be usable. Without one, the image
  // the program came from is taken if it is still there, unless `full`.
  std::optional<std::string> parent;
  bool full = false;
  // A program that still maps its image is dumped as it is where that is possible.
  bool while_mapped = false;
  // And one that is independent of it is compared with the parent while it runs, so that only what
  // differs is read while it stands still. Implies while_mapped.
  bool track_mem = false;
  // The memory is written while the program runs, in at most so many rounds, and only what it has
  // changed since is read while it stands still. 0: not.
  int pre_dump_rounds = 0;
  std::optional<std::string> criu;
  std::vector<std::string> criu_arguments;
  std::string tool_version;
  std::optional<Compression>
      compression;       // pack the new layer once the program has its end or runs on
  bool verbose = false;  // criu logs more and its log stays in the image directory
  CheckpointPlanOptions plan;
};

// Told of what goes on; may be empty. Called from several threads, one at a time.
struct CheckpointObserver {
  // A remap has to end first: how far it is.
  std::function<void(Pid, const RemapReport&)> remapping;
  // Bytes received of the expected ones (an estimate made before the dump).
  std::function<void(Bytes done, Bytes expected)> dumping;
  // Of a round before the dump (pre_dump_rounds).
  std::function<void(Bytes done, Bytes expected)> writing_ahead;
  // The new layers, after that.
  std::function<void(Bytes done, Bytes total)> packing;
};

struct CheckpointReport {
  Manifest manifest;
  std::string directory;  // absolute
  Nanos frozen;           // as CRIU measured it (stats-dump); 0: it left no figure
  Nanos elapsed;
  Bytes allocated;  // on disk, the whole directory's pages
  bool remapped_first = false;
  bool still_mapped = false;  // dumped while it mapped its image, of which only changes were read
  std::optional<std::string> parent;  // of which layers are used; nothing: a full dump
  Bytes read;                         // pages that CRIU read while the program stood still
  Bytes written;                      // pages in new layers
  int rounds = 0;                     // of writing before the freeze
  std::optional<Bytes> packed;        // the new layers' bytes when packed
};

[[nodiscard]] Result<CheckpointReport> Dump(const CheckpointOptions& options,
                                            const CheckpointObserver& observer);

// What a dump would do with each VMA of each task, without stopping anything.
struct DryRunTask {
  Pid pid;
  std::string name;
  std::vector<PlannedVma> plan;
};
[[nodiscard]] Result<std::vector<DryRunTask>> PlanDump(const CheckpointOptions& options);

// The user's mistakes about the process to dump: absent, kernel thread, zombie, ourselves.
[[nodiscard]] Result<> CheckDumpable(Pid pid);
// That nobody traces `pid` or a process below it. An agent of ours is waited for, `patience` long.
[[nodiscard]] Result<> CheckUntraced(Pid pid, Nanos patience);

}  // namespace unmoor
