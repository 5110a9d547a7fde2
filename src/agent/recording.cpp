// See recording.h.
#include "agent/recording.h"

#include <nlohmann/json.hpp>

#include "agent/agent.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor {
namespace {

using nlohmann::json;

std::string PathFor(Pid pid) {
  return fmt::format("{}/{}{}", RuntimeDirectory(), pid.value, kRecordingSuffix);
}

}  // namespace

Result<> NoteRecording(Pid pid, const Recording& recording) {
  UNMOOR_ASSIGN(const ProcessInfo process, ReadProcess(pid));
  if (!Exists(RuntimeDirectory())) UNMOOR_TRY(MakeDirectory(RuntimeDirectory(), 0755));
  const json content = {{"start_time", process.start_time},
                        {"recorder", recording.recorder.value},
                        {"directory", recording.directory},
                        {"problem", recording.problem}};
  const std::string temporary = fmt::format("{}.{}", PathFor(pid), OwnPid().value);
  UNMOOR_TRY(
      WriteFile(temporary, content.dump(-1, ' ', false, json::error_handler_t::replace) + "\n"));
  return Rename(temporary, PathFor(pid));
}

std::optional<Recording> FindRecording(Pid pid) {
  const auto text = ReadFile(PathFor(pid), Bytes(65536));
  const auto process = ReadProcess(pid);
  if (!text || !process) return std::nullopt;
  const json content = json::parse(*text, nullptr, false);
  if (!content.is_object() || content.value("start_time", uint64_t{0}) != process->start_time) {
    return std::nullopt;
  }
  return Recording{Pid{content.value("recorder", 0)}, content.value("directory", ""),
                   content.value("problem", "")};
}

void ForgetRecording(Pid pid) {
  (void)RemoveFile(PathFor(pid));
}

}  // namespace unmoor
