// See progress_file.h.
#include "agent/progress_file.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "agent/known_image.h"
#include "agent/recording.h"
#include "agent/runtime_file.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor {
namespace {

using nlohmann::json;

json ToJson(const ProgressFile& p) {
  const RemapReport& r = p.report;
  return {{"pid", p.pid.value},
          {"start_time", p.start_time},
          {"worker", p.worker.value},
          {"supervisor", p.supervisor.value},
          {"finished", p.finished},
          {"lazy", p.lazy},
          {"never", p.never},
          {"problem", p.problem},
          {"total", r.total.value},
          {"done", r.done.value},
          {"dropped", r.dropped.value},
          {"windows", r.windows},
          {"guarded", r.guarded},
          {"aborted", r.aborted},
          {"verified", r.verified.value},
          {"longest_pause_ns", r.longest_pause.value},
          {"elapsed_ns", r.elapsed.value},
          {"copy_rate", r.copy_rate}};
}

ProgressFile FromJson(const json& j) {
  ProgressFile p;
  p.pid = Pid{j.at("pid").get<int>()};
  p.start_time = j.at("start_time").get<uint64_t>();
  p.worker = Pid{j.at("worker").get<int>()};
  p.supervisor = Pid{j.at("supervisor").get<int>()};
  p.finished = j.at("finished").get<bool>();
  p.lazy = j.value("lazy", false);  // older agents do not say
  p.never = j.value("never", false);
  p.problem = j.at("problem").get<std::string>();
  p.report.total = Bytes(j.at("total").get<uint64_t>());
  p.report.done = Bytes(j.at("done").get<uint64_t>());
  p.report.dropped = Bytes(j.at("dropped").get<uint64_t>());
  p.report.windows = j.at("windows").get<uint64_t>();
  p.report.guarded = j.at("guarded").get<uint64_t>();
  p.report.aborted = j.at("aborted").get<uint64_t>();
  p.report.verified = Bytes(j.value("verified", uint64_t{0}));
  p.report.longest_pause = Nanos(j.at("longest_pause_ns").get<int64_t>());
  p.report.elapsed = Nanos(j.at("elapsed_ns").get<int64_t>());
  p.report.copy_rate = j.at("copy_rate").get<double>();
  return p;
}

// Of this process or an earlier one of that id.
std::optional<ProgressFile> ReadWhoevers(Pid pid) {
  const auto content = ReadRuntimeFile(pid, kProgressSuffix);
  if (!content) return std::nullopt;
  try {
    return FromJson(*content);
  } catch (const json::exception&) {
    return std::nullopt;
  }
}

// ".json.WRITER" and the like: not renamed yet, and nobody is left to do it.
bool IsOfKilledWriter(std::string_view rest) {
  const size_t dot = rest.rfind('.');
  if (dot == std::string_view::npos ||
      std::ranges::find(kRuntimeSuffixes, rest.substr(0, dot)) == kRuntimeSuffixes.end()) {
    return false;
  }
  Pid writer;
  const char* const all = rest.data() + rest.size();
  const auto [end, error] = std::from_chars(rest.data() + dot + 1, all, writer.value);
  if (error != std::errc() || end != all) return false;
  const auto process = ReadProcess(writer);
  return !process || process->ended();
}

}  // namespace

Result<> WriteProgress(const ProgressFile& progress) {
  return WriteRuntimeFile(progress.pid, kProgressSuffix, ToJson(progress));
}

std::optional<ProgressFile> ReadProgress(Pid pid) {
  auto progress = ReadWhoevers(pid);
  const auto process = ReadProcess(pid);
  if (!progress || !process || process->start_time != progress->start_time) return std::nullopt;
  return progress;
}

std::optional<std::string> WhyEnded(Pid pid) {
  const auto progress = ReadWhoevers(pid);
  if (!progress || !progress->lazy || !progress->finished || progress->problem.empty()) {
    return std::nullopt;
  }
  return progress->problem;
}

std::optional<Pid> AgentAtWork(const ProgressFile& progress) {
  if (progress.finished) return std::nullopt;
  for (const Pid agent : {progress.worker, progress.supervisor}) {
    const auto process = ReadProcess(agent);
    if (process && process->name == "unmoor-agent" && process->state != 'Z') return agent;
  }
  return std::nullopt;
}

void FinishProgress(Pid pid, Pid supervisor, const std::string& problem) {
  auto progress = ReadProgress(pid);
  if (!progress || progress->supervisor != supervisor || progress->finished) return;
  progress->finished = true;
  progress->problem = problem;
  (void)WriteProgress(*progress);
}

void ForgetEndedProcesses() {
  const auto names = ListDirectory(RuntimeDirectory());
  if (!names) return;
  for (const std::string& name : *names) {
    Pid pid;
    const char* const all = name.data() + name.size();
    const auto [end, error] = std::from_chars(name.data(), all, pid.value);
    if (error != std::errc()) continue;
    const std::string_view rest(end, static_cast<size_t>(all - end));
    const bool forget = rest == kProgressSuffix     ? !ReadProgress(pid)
                        : rest == kKnownImageSuffix ? !FindKnownImage(pid)
                        : rest == kRecordingSuffix  ? !FindRecording(pid)
                                                    : IsOfKilledWriter(rest);
    if (forget) (void)RemoveFile(RuntimeDirectory() + "/" + name);
  }
}

}  // namespace unmoor
