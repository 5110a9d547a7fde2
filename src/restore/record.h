// Recording: which pages of its layers a direct-mapped program touches, and roughly in which order.
//
// From outside, by looking at the page tables of the tasks (PAGEMAP_SCAN) every few milliseconds:
// the program is neither stopped nor slowed. What is exact: every page that was touched while it
// was mapped is in the result. What is not: of memory that the page cache has in huge pages, as
// after a dump, a touch maps 2 MiB, which count as touched (a restore that is recorded has the
// cache forget the layers first: RestoreOptions::recorded); and between two looks the order is
// that of the file. Nothing may remap the program meanwhile: what it moved is not seen.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "image/layer_reader.h"
#include "image/working_set.h"
#include "os/fd.h"
#include "os/procfs.h"
#include "os/spawn.h"
#include "remap/range_set.h"

namespace unmoor {

class Recorder {
 public:
  // `directory` is the image that the tasks map. A first look is taken.
  [[nodiscard]] static Result<Recorder> Begin(const std::vector<Pid>& tasks,
                                              const std::string& directory);
  // False when no task is left that maps a layer.
  [[nodiscard]] bool Look();
  [[nodiscard]] WorkingSet TakeResult();
  [[nodiscard]] const std::string& checkpoint_id() const { return checkpoint_id_; }

 private:
  struct Task {
    Pid pid;
    Fd pagemap;
  };
  Recorder() = default;
  [[nodiscard]] std::optional<uint32_t> LayerOf(const VmaInfo& vma) const;
  void Note(uint32_t layer, FileRange range);

  std::string checkpoint_id_;
  std::vector<Task> tasks_;
  std::vector<LayerReader> layers_;
  std::vector<ino_t> inodes_;   // of the layers' pages files
  std::vector<RangeSet> seen_;  // of each layer, as if its file lay at address 0
  WorkingSet set_;
};

struct RecordOptions {
  std::vector<Pid> tasks;
  std::string directory;
  Nanos until{-1};  // at most so long; negative: until interrupted
};

struct RecordReport {
  Bytes bytes;
  size_t ranges = 0;
  Nanos elapsed;
  bool kept_earlier = false;  // nothing was touched: these are the figures of the set that stays
};

// Until the time is up, an interrupt (SIGINT, SIGTERM, SIGHUP) comes, or nothing maps the image any
// more; then the working set is in the directory. A recording in which nothing was touched does not
// take the place of one in which something was.
[[nodiscard]] Result<RecordReport> RecordWorkingSet(const RecordOptions& options,
                                                    InterruptFd& interrupt);

}  // namespace unmoor
