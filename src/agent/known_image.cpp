// See known_image.h.
#include "agent/known_image.h"

#include <nlohmann/json.hpp>

#include "agent/agent.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor {
namespace {

using nlohmann::json;

std::string PathFor(Pid pid) {
  return fmt::format("{}/{}{}", RuntimeDirectory(), pid.value, kKnownImageSuffix);
}

void Write(Pid pid, const KnownImage& image) {
  const auto process = ReadProcess(pid);
  if (!process) return;
  const json content = {{"start_time", process->start_time},
                        {"directory", image.directory},
                        {"checkpoint_id", image.checkpoint_id}};
  const std::string temporary = fmt::format("{}.{}", PathFor(pid), OwnPid().value);
  const std::string text = content.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
  if (WriteFile(temporary, text)) (void)Rename(temporary, PathFor(pid));
}

}  // namespace

void RememberImage(std::span<const Pid> pids, const KnownImage& image) {
  const std::string directory = RuntimeDirectory();
  if (!Exists(directory) && !MakeDirectory(directory, 0755)) return;
  for (const Pid pid : pids) Write(pid, image);
}

std::optional<KnownImage> FindKnownImage(Pid pid) {
  const auto text = ReadFile(PathFor(pid), Bytes(65536));
  const auto process = ReadProcess(pid);
  if (!text || !process) return std::nullopt;
  const json content = json::parse(*text, nullptr, false);
  if (!content.is_object()) return std::nullopt;
  const auto start = content.find("start_time");
  const auto directory = content.find("directory");
  const auto id = content.find("checkpoint_id");
  if (start == content.end() || *start != process->start_time || directory == content.end() ||
      !directory->is_string() || id == content.end() || !id->is_string()) {
    return std::nullopt;
  }
  return KnownImage{directory->get<std::string>(), id->get<std::string>()};
}

}  // namespace unmoor
