// Files about one process in the runtime directory: <pid><suffix>. Internal to src/agent.
//
// Replaced as a whole, so a reader never sees half of one. They are messages, never the truth: what
// is in them is checked by whoever reads them. progress_file.h forgets those of ended processes.
#pragma once

#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "agent/known_image.h"
#include "agent/recording.h"
#include "base/result.h"
#include "base/units.h"

namespace unmoor {

inline constexpr std::string_view kProgressSuffix = ".json";
inline constexpr std::array kRuntimeSuffixes = {kProgressSuffix, kKnownImageSuffix,
                                                kRecordingSuffix};

// Makes the directory where there is none. Bytes that are no UTF-8 are replaced.
[[nodiscard]] Result<> WriteRuntimeFile(Pid pid, std::string_view suffix,
                                        const nlohmann::json& content);
// Nothing when there is none, or it holds no JSON object.
[[nodiscard]] std::optional<nlohmann::json> ReadRuntimeFile(Pid pid, std::string_view suffix);
void RemoveRuntimeFile(Pid pid, std::string_view suffix);

}  // namespace unmoor
