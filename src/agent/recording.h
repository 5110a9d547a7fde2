// Who records the working set of a program, and where to: a small file in the runtime directory, by
// which `unmoor record --stop` finds the recorder. It is there while it records; what is left of a
// killed one is forgotten with its program (progress_file.h).
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

inline constexpr std::string_view kRecordingSuffix = ".record";

struct Recording {
  Pid recorder;
  std::string directory;  // absolute
  std::string problem;    // why it ended without a result; empty: it is at work
};

[[nodiscard]] Result<> NoteRecording(Pid pid, const Recording& recording);
[[nodiscard]] std::optional<Recording> FindRecording(Pid pid);
void ForgetRecording(Pid pid);

}  // namespace unmoor
