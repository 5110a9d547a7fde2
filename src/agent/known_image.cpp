// See known_image.h.
#include "agent/known_image.h"

#include "agent/runtime_file.h"
#include "os/procfs.h"

namespace unmoor {

void RememberImage(std::span<const Pid> pids, const KnownImage& image) {
  for (const Pid pid : pids) {
    const auto process = ReadProcess(pid);
    if (!process) continue;
    (void)WriteRuntimeFile(pid, kKnownImageSuffix,
                           {{"start_time", process->start_time},
                            {"directory", image.directory},
                            {"checkpoint_id", image.checkpoint_id}});
  }
}

std::optional<KnownImage> FindKnownImage(Pid pid) {
  const auto content = ReadRuntimeFile(pid, kKnownImageSuffix);
  const auto process = ReadProcess(pid);
  if (!content || !process) return std::nullopt;
  const auto start = content->find("start_time");
  const auto directory = content->find("directory");
  const auto id = content->find("checkpoint_id");
  if (start == content->end() || *start != process->start_time || directory == content->end() ||
      !directory->is_string() || id == content->end() || !id->is_string()) {
    return std::nullopt;
  }
  return KnownImage{directory->get<std::string>(), id->get<std::string>()};
}

}  // namespace unmoor
