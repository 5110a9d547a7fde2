// See recording.h.
#include "agent/recording.h"

#include "agent/runtime_file.h"
#include "os/procfs.h"

namespace unmoor {

Result<> NoteRecording(Pid pid, const Recording& recording) {
  UNMOOR_ASSIGN(const ProcessInfo process, ReadProcess(pid));
  return WriteRuntimeFile(pid, kRecordingSuffix,
                          {{"start_time", process.start_time},
                           {"recorder", recording.recorder.value},
                           {"directory", recording.directory},
                           {"problem", recording.problem}});
}

std::optional<Recording> FindRecording(Pid pid) {
  const auto content = ReadRuntimeFile(pid, kRecordingSuffix);
  const auto process = ReadProcess(pid);
  if (!content || !process) return std::nullopt;
  try {
    if (content->at("start_time").get<uint64_t>() != process->start_time) return std::nullopt;
    return Recording{Pid{content->at("recorder").get<int>()},
                     content->at("directory").get<std::string>(),
                     content->at("problem").get<std::string>()};
  } catch (const nlohmann::json::exception&) {
    return std::nullopt;
  }
}

void ForgetRecording(Pid pid) {
  RemoveRuntimeFile(pid, kRecordingSuffix);
}

}  // namespace unmoor
