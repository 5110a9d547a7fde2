// The supervisor: the detached process that starts one worker for each address space, holds every
// worker's userfaultfd a second time, and replaces a worker that dies.
//
// Its own death harms nothing: workers go on alone. Single-threaded. See agent.h.
#pragma once

#include <vector>

#include "agent/agent.h"
#include "base/result.h"
#include "os/fd.h"

namespace unmoor {

// What travels between a worker, the supervisor and the command that started it, over a
// SOCK_SEQPACKET socket. Plain data; a kGuarded or kForked message carries a userfaultfd.
struct AgentMessage {
  enum class Kind : uint32_t {
    kGuarded,   // worker: this program's memory behaves; the uffd to hold
    kForked,    // worker: this child was born; its uffd
    kFinished,  // worker: READY, or the program ended
    kProblem,   // worker: text says why the remap does not go on; it watches and tries again
    kFailed,    // worker: text says why it gave up; the program goes on direct-mapped
    kResume,    // command → supervisor → worker: let the program run
    kRunning,   // worker: it runs
  } kind = Kind::kFailed;
  int32_t pid = 0;
  RemapReport report;
  char text[512] = {};
};

struct SupervisorTask {
  Pid pid;
  bool stopped = false;  // by SIGSTOP; waits for kResume
  bool stay_stopped = false;
};

// Forks the supervisor; returns our end of its socket and its pid. It sends on every message of the
// workers for `tasks`, none of those for their children, and never waits for them to be read; it
// ends after the last worker.
struct SupervisorHandle {
  Fd socket;
  Pid pid;
};
[[nodiscard]] Result<SupervisorHandle> StartSupervisor(const std::vector<SupervisorTask>& tasks,
                                                       const AgentOptions& options);

// The next message; nothing when the supervisor is gone.
[[nodiscard]] Result<std::optional<AgentMessage>> NextMessage(int socket, Fd* passed = nullptr);
[[nodiscard]] Result<> PostMessage(int socket, const AgentMessage& message, int fd = -1);
// Without waiting: false when the other side has to read first.
[[nodiscard]] Result<bool> TryPostMessage(int socket, const AgentMessage& message);

}  // namespace unmoor
