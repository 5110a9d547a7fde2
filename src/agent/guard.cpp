// See guard.h.
#include "agent/guard.h"

#include "agent/inject.h"
#include "base/log.h"
#include "os/procfs.h"
#include "os/ptrace.h"

namespace unmoor {
namespace {

constexpr int kAttempts = 50;
constexpr Nanos kStopTogether(5'000'000);

}  // namespace

bool Guard::Ready(Pid pid, const HelperLink& link) {
  if (ready_ || attempts_ == kAttempts) return ready_;
  const auto process = ReadProcess(pid);
  if (!process || process->state == 'T') return false;  // nobody runs on there anyway
  ++attempts_;
  ProgramStop stop(pid);
  auto injected = stop.Stop(kStopTogether, {});
  if (injected) injected = InjectWatch(pid, link.helper(), stop.threads());
  ready_ = injected.has_value();
  if (!ready_)
    spdlog::debug("no watch inside process {}: {}", pid.value, injected.error().message());
  return ready_;
}

}  // namespace unmoor
