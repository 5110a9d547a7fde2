// Status of a process, derived from /proc; see agent.h.
#include <algorithm>
#include <cstdlib>

#include "agent/agent.h"
#include "agent/inject.h"
#include "agent/page_image.h"
#include "agent/progress_file.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor {
namespace {

// Content that still comes from the image, as far as the image can still be looked at.
Bytes DataOf(Pid pid, const VmaInfo& vma) {
  const std::string path = fmt::format("/proc/{}/map_files/{:x}-{:x}", pid.value,
                                       vma.range.begin.value, vma.range.end.value);
  const auto fd = OpenFile(path, 0 /*O_RDONLY*/);
  if (!fd) return vma.range.size();
  const auto ranges = DataRanges(fd->get(), {vma.offset, vma.offset + vma.range.size()}, vma.name);
  if (!ranges) return vma.range.size();
  Bytes total;
  for (const FileRange& range : *ranges) total += range.size();
  return total;
}

// Memory that somebody brings page by page through a userfaultfd: what has not come is missing in
// /proc/PID/pagemap, so a checkpoint would lose it.
Result<Bytes> BroughtLazily(Pid pid) {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadSmaps(pid));
  Bytes total;
  for (const VmaInfo& vma : vmas) {
    if (vma.HasFlag("um")) total += vma.range.size();
  }
  return total;
}

std::string TimeLeft(Bytes left, const RemapReport& report) {
  if (report.copy_rate <= 0) return {};
  const double seconds = static_cast<double>(left.value) / report.copy_rate;
  return fmt::format(", about {}", HumanTime(Nanos(static_cast<int64_t>(seconds * 1e9))));
}

std::string LazyReason(const ProgressFile& progress) {
  if (!progress.problem.empty()) return progress.problem;
  const RemapReport& report = progress.report;
  const Bytes left = report.total - report.done - report.dropped;
  return fmt::format("{} of its memory to come{}", HumanBytes(left), TimeLeft(left, report));
}

std::string LaterReason(const ProcessStatus& status, const std::optional<ProgressFile>& progress) {
  const std::string left = HumanBytes(status.direct_mapped_data);
  if (progress && !progress->problem.empty()) return progress->problem;
  if (!status.agent) {
    return fmt::format("{} still mapped from a page image and no agent at work; run `unmoor remap`",
                       left);
  }
  if (!progress) return fmt::format("{} to go", left);
  return fmt::format("{} to go{}", left, TimeLeft(status.direct_mapped_data, progress->report));
}

bool IsAnythingLeft(Pid pid) {
  const auto leftovers = FindLeftovers(pid);
  const auto helpers = FindHelpers(pid);
  return (leftovers && !leftovers->empty()) || (helpers && !helpers->empty());
}

}  // namespace

std::string RuntimeDirectory() {
  if (const char* directory = std::getenv("UNMOOR_RUNTIME_DIR")) return directory;
  if (OwnUid() == 0) return "/run/unmoor";
  return fmt::format("/tmp/unmoor-{}", OwnUid());
}

Result<ProcessStatus> QueryStatus(Pid pid) {
  const auto process = ReadProcess(pid);
  if (!process) {
    if (const auto why = WhyEnded(pid))
      return UserError("process {} was ended: {}", pid.value, *why);
    return UserError("no process {}", pid.value);
  }
  ProcessStatus status;
  if (process->ended()) {
    status.status = Status::kNever;
    const auto why = WhyEnded(pid);
    status.reason = fmt::format("process {} ({}) has ended and waits for its parent{}", pid.value,
                                process->name, why ? "; it was ended: " + *why : "");
    return status;
  }
  if (process->kernel_thread) {
    status.status = Status::kNever;
    status.reason = fmt::format("process {} ({}) is a kernel thread", pid.value, process->name);
    return status;
  }
  const auto vmas = ReadMaps(pid);
  if (!vmas) return Failure(vmas.error());
  for (const VmaInfo& vma : *vmas) {
    if (!MapsPageImage(vma)) continue;
    status.direct_mapped += vma.range.size();
    status.direct_mapped_data += DataOf(pid, vma);
    if (std::ranges::find(status.images, vma.name) == status.images.end()) {
      status.images.push_back(vma.name);
    }
  }
  const std::optional<ProgressFile> progress = ReadProgress(pid);
  if (progress) {
    status.progress = progress->report;
    status.agent = AgentAtWork(*progress);
  }
  if (status.direct_mapped.value != 0 && progress && progress->never) {
    status.status = Status::kNever;
    status.reason = progress->problem;
  } else if (status.direct_mapped.value != 0) {
    status.status = Status::kLater;
    status.reason = LaterReason(status, progress);
  } else if (status.agent) {
    status.status = Status::kLater;
    status.reason = progress->lazy ? LazyReason(*progress) : "the agent is leaving the program";
  } else if (progress && (!progress->finished || !progress->problem.empty()) &&
             IsAnythingLeft(pid)) {
    status.status = Status::kLater;
    status.reason = "its agent died and left traces in it; run `unmoor remap` to remove them";
  } else {
    UNMOOR_ASSIGN(status.lazy, BroughtLazily(pid));
    if (status.lazy.value == 0) return status;
    status.status = Status::kLater;
    status.reason =
        fmt::format("pages of {} of its memory may still have to be brought, through a userfaultfd",
                    HumanBytes(status.lazy));
  }
  return status;
}

Result<ProcessStatus> WaitReady(Pid pid, Nanos timeout,
                                const std::function<void(const ProcessStatus&)>& progress) {
  const Nanos began = MonotonicNow();
  for (;;) {
    UNMOOR_ASSIGN(ProcessStatus status, QueryStatus(pid));
    if (progress) progress(status);
    const bool timed_out = timeout.value >= 0 && MonotonicNow() - began >= timeout;
    if (status.status != Status::kLater || timed_out) return status;
    SleepFor(Nanos(20'000'000));
  }
}

}  // namespace unmoor
