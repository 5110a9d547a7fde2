// See guard.h.
#include "agent/guard.h"

#include "base/log.h"

namespace unmoor {

void Guard::Begin(Pid pid, const HelperProcess& helper, std::span<StoppedThread> stopped) {
  const auto injected = InjectWatch(pid, helper, stopped);
  ready_ = injected.has_value();
  if (!ready_) spdlog::debug("no watch in process {}: {}", pid.value, injected.error().message());
}

}  // namespace unmoor
