// See log.h.
#include "base/log.h"

#include <spdlog/sinks/stdout_sinks.h>

namespace unmoor {

void InitLogging(int verbosity) {
  auto logger =
      std::make_shared<spdlog::logger>("unmoor", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_pattern(verbosity >= 2 ? "unmoor: %H:%M:%S.%e [%P] %l: %v" : "unmoor: %v");
  logger->set_level(verbosity < 0    ? spdlog::level::err
                    : verbosity == 0 ? spdlog::level::warn
                    : verbosity == 1 ? spdlog::level::info
                                     : spdlog::level::debug);
  logger->flush_on(spdlog::level::debug);
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace unmoor
