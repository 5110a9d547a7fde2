// See runtime_file.h.
#include "agent/runtime_file.h"

#include "agent/agent.h"
#include "os/file.h"
#include "os/process_control.h"

namespace unmoor {
namespace {

using nlohmann::json;

std::string PathFor(Pid pid, std::string_view suffix) {
  return fmt::format("{}/{}{}", RuntimeDirectory(), pid.value, suffix);
}

}  // namespace

Result<> WriteRuntimeFile(Pid pid, std::string_view suffix, const json& content) {
  const std::string directory = RuntimeDirectory();
  if (!Exists(directory)) UNMOOR_TRY(MakeDirectory(directory, 0755));
  const std::string path = PathFor(pid, suffix);
  const std::string temporary = fmt::format("{}.{}", path, OwnPid().value);
  UNMOOR_TRY(
      WriteFile(temporary, content.dump(-1, ' ', false, json::error_handler_t::replace) + "\n"));
  return Rename(temporary, path);
}

std::optional<json> ReadRuntimeFile(Pid pid, std::string_view suffix) {
  const auto text = ReadFile(PathFor(pid, suffix), Bytes(65536));
  if (!text) return std::nullopt;
  json content = json::parse(*text, nullptr, false);
  if (!content.is_object()) return std::nullopt;
  return content;
}

void RemoveRuntimeFile(Pid pid, std::string_view suffix) {
  (void)RemoveFile(PathFor(pid, suffix));
}

}  // namespace unmoor
