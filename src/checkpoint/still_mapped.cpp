// See still_mapped.h.
#include "checkpoint/still_mapped.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <set>

#include "agent/inject.h"
#include "agent/page_image.h"
#include "os/file.h"
#include "os/procfs.h"

namespace unmoor {
namespace {

constexpr Nanos kLeavePatience(5'000'000'000);
constexpr int kLooks = 100;
constexpr Bytes kLeastPutBack(uint64_t{1} << 20);  // less is read as fast

// As CRIU names it: the mount and the inode of the file behind a mapping.
Result<std::string> ExternalKey(Pid pid, const VmaInfo& vma) {
  UNMOOR_ASSIGN(const Fd file, OpenFile(fmt::format("/proc/{}/map_files/{:x}-{:x}", pid.value,
                                                    vma.range.begin.value, vma.range.end.value),
                                        O_RDONLY));
  const std::string fdinfo = fmt::format("/proc/self/fdinfo/{}", file.get());
  UNMOOR_ASSIGN(const std::string text, ReadFile(fdinfo));
  constexpr std::string_view kLabel = "mnt_id:";
  const size_t at = text.find(kLabel);
  if (at == std::string::npos) return MachineError("{} names no mount", fdinfo);
  const auto mount = std::strtoul(text.c_str() + at + kLabel.size(), nullptr, 10);
  return fmt::format("file[{:x}:{:x}]", mount, vma.inode);
}

// Adds the keys of what `pid` maps; true when it maps anything. errnum ENOENT: the program, which
// runs, has just unmapped it.
Result<bool> AddFiles(Pid pid, const Parent& parent, StillMapped& found) {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid));
  std::set<uint32_t> layers;
  for (const VmaInfo& vma : vmas) {
    if (!MapsPageImage(vma)) continue;
    const auto layer = parent.LayerOf(vma);
    if (!layer) {
      found.why_not = fmt::format("process {} maps {}, which is no layer of {}", pid.value,
                                  vma.name, parent.directory());
      return true;
    }
    if (!layers.insert(*layer).second) continue;
    UNMOOR_ASSIGN(std::string key, ExternalKey(pid, vma));
    if (std::ranges::find(found.files, key) == found.files.end()) {
      found.files.push_back(std::move(key));
    }
  }
  return !layers.empty();
}

Result<bool> AddFilesOfRunning(Pid pid, const Parent& parent, StillMapped& found) {
  for (int attempt = 0;; ++attempt) {
    auto maps = AddFiles(pid, parent, found);
    const bool changed = !maps && maps.error().errnum() == ENOENT;
    if (!changed || attempt == kLooks) return maps;
  }
}

// Of an agent that left in order nothing is inside. One that died has nobody to answer what the
// program gives back.
Result<std::string> WhyNotWithoutAgent(Pid pid) {
  const auto helpers = FindHelpers(pid);
  UNMOOR_ASSIGN(const std::vector<Leftover> leftovers, FindLeftovers(pid));
  UNMOOR_ASSIGN(const ProcessStatus status, QueryStatus(pid));
  if (status.agent && leftovers.empty() && helpers && helpers->empty()) return std::string();
  return fmt::format("process {} maps its image, but has no agent at work", pid.value);
}

// Nothing: it has ended, or ends just now (a child or helper that lived for a moment).
Result<std::optional<HoldOff>> Ask(Pid pid) {
  const auto has_ended = [pid] {
    const auto info = ReadProcess(pid);
    return !info || info->ending();
  };
  if (has_ended()) return std::optional<HoldOff>();
  auto program = HoldOff::Begin(pid);
  if (program) return std::optional<HoldOff>(*std::move(program));
  if (has_ended()) return std::optional<HoldOff>();
  return Failure(program.error());
}

}  // namespace

Result<std::vector<HoldOff>> AskForTree(Pid root) {
  std::vector<HoldOff> asked;
  UNMOOR_ASSIGN(const std::vector<Pid> tree, ReadTree(root));
  for (const Pid pid : tree) {
    UNMOOR_ASSIGN(auto program, Ask(pid));
    if (program) asked.push_back(*std::move(program));
  }
  return asked;
}

Result<std::vector<HoldOff>> HoldTree(Pid root, std::vector<HoldOff> asked) {
  std::vector<HoldOff> held;
  for (bool complete = false; !complete;) {
    complete = true;
    UNMOOR_ASSIGN(const std::vector<Pid> tree, ReadTree(root));
    for (const Pid pid : tree) {
      if (std::ranges::find(held, pid, &HoldOff::pid) != held.end()) continue;
      const auto before = std::ranges::find(asked, pid, &HoldOff::pid);
      std::optional<HoldOff> program;
      if (before != asked.end()) {
        program.emplace(std::move(*before));
      } else {
        UNMOOR_ASSIGN(program, Ask(pid));
      }
      if (!program) continue;
      UNMOOR_ASSIGN(const bool ours, program->Await(kLeavePatience));
      if (!ours) {
        return Failure(Error(
            ErrorKind::kMachine, EAGAIN,
            fmt::format("the agent of process {} cannot leave it just now; try again", pid.value)));
      }
      held.push_back(*std::move(program));
      complete = false;
    }
  }
  return held;
}

Result<StillMapped> FindStillMapped(const std::vector<HoldOff>& programs, const Parent& parent) {
  StillMapped found;
  for (const HoldOff& program : programs) {
    const auto maps = AddFilesOfRunning(program.pid(), parent, found);
    const auto now = ReadProcess(program.pid());
    if (!maps && (!now || now->ended())) continue;
    UNMOOR_TRY(maps);
    if (*maps && found.why_not.empty()) {
      UNMOOR_ASSIGN(found.why_not, WhyNotWithoutAgent(program.pid()));
    }
    if (!found.why_not.empty()) return found;
  }
  return found;
}

Result<std::vector<PutBackTask>> FindShownByParent(const std::vector<HoldOff>& programs,
                                                   const Parent& parent,
                                                   const CheckpointPlanOptions& options) {
  std::vector<PutBackTask> tasks;
  for (const HoldOff& program : programs) {
    const Pid pid = program.pid();
    UNMOOR_ASSIGN(const ProcessStatus status, QueryStatus(pid));
    if (status.status != Status::kReady) return std::vector<PutBackTask>();
    UNMOOR_ASSIGN(const ProcessInfo info, ReadProcess(pid));
    UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadSmaps(pid));
    const int vpid = info.ns_pids.empty() ? pid.value : info.ns_pids.back();
    PutBackTask task{pid, {}};
    for (const PlannedVma& item : PlanTask(vmas, options)) {
      if (!item.mapped || item.vma.anonymous < kLeastPutBack) continue;
      const auto base = parent.Find(static_cast<uint32_t>(vpid), item.vma);
      if (!base) continue;
      task.ranges.push_back(
          {item.vma.range, parent.layers()[base->vma.layer].pages_path(), base->vma.offset});
    }
    if (!task.ranges.empty()) tasks.push_back(std::move(task));
  }
  return tasks;
}

bool WaitsForAgent(const std::vector<HoldOff>& programs) {
  return std::ranges::any_of(programs, [](const HoldOff& program) {
    const auto calls = ReadThreadCalls(program.pid());
    return calls && calls->waiting_for_event() > 0;
  });
}

}  // namespace unmoor
