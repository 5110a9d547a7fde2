// The supervisor: the detached process that starts one worker for each address space, holds every
// worker's userfaultfd a second time, and replaces a worker that dies.
//
// Its own death harms nothing: workers go on alone. Single-threaded. See agent.h.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "agent/agent.h"
#include "agent/put_back.h"
#include "base/result.h"
#include "os/daemon.h"
#include "os/fd.h"
#include "os/socket.h"

namespace unmoor {

// What travels between a worker, the supervisor and the command that started it, over a
// SOCK_SEQPACKET socket. Plain data; a kGuarded or kForked message carries a userfaultfd.
struct AgentMessage {
  enum class Kind : uint32_t {
    kGuarded,    // worker: this program's memory behaves; the uffd to hold. Goes no further than
                 // the supervisor while a restore is unfinished
    kRecorded,   // worker: its progress file says that it is at work
    kForked,     // worker: this child was born; its uffd
    kFinished,   // worker: READY, or the program ended
    kProblem,    // worker: text says why the remap does not go on; it watches and tries again
    kFailed,     // worker: text says why it gave up; the program goes on direct-mapped
    kRestoring,  // command → supervisor: pid is the criu at work
    kExpect,     // command → supervisor: so many tasks will probably come (lazy: and where criu
                 // is going to connect to, a listening socket)
    kAdopt,      // command → supervisor → worker: a restored task, stopped by SIGSTOP
    kResume,     // command → supervisor: the program may run once all of it is guarded
                 // supervisor → worker: it runs
    kStandDown,  // command → supervisor: it will not
    kRunning,    // supervisor: it does, and its worker is on record
  } kind = Kind::kFailed;
  int32_t pid = 0;
  uint64_t tasks = 0;
  bool stay_stopped = false;  // of kAdopt: was stopped already when dumped
  RemapReport report;
  char text[512] = {};
};

// `text` is cut to what fits.
[[nodiscard]] AgentMessage MakeMessage(AgentMessage::Kind kind, Pid pid,
                                       std::string_view text = {});

struct SupervisorTask {
  Pid pid;
  bool stopped = false;  // by SIGSTOP; waits for kResume
  bool stay_stopped = false;
  std::vector<ShownByLayer> put_back = {};  // first of all (put_back.h)
};

// Our end of a supervisor's socket, and its pid once it has begun. It sends on every message of the
// workers for `tasks`, none of those for their children, and never waits for them to be read; it
// ends after the last worker.
// With a `view` it waits for kAdopt to tell which tasks to guard, and lets them run when kResume
// has come and all are. It ends when the command ends before that or says kStandDown; in the first
// case it also ends what was restored until then (the criu of kRestoring and all below it, the
// tasks adopted). `view` holds criu's images and its pidfile ("pid") and may not be there yet; the
// death of the command, also later, removes it.
struct SupervisorHandle {
  Fd socket;
  StartingDaemon process;
};
// The detached process of an agent, which has nothing open of its maker's but `keep`. In the maker:
// the handle. In the agent: nothing, and `pair.theirs`, which has to be among `keep`, is its end.
[[nodiscard]] Result<std::optional<SupervisorHandle>> ForkAgent(StreamPair& pair,
                                                                std::span<const int> keep,
                                                                const AgentOptions& options);
[[nodiscard]] Result<SupervisorHandle> StartSupervisor(
    const std::vector<SupervisorTask>& tasks, const AgentOptions& options,
    const std::optional<std::string>& view = std::nullopt);

// The next message; nothing when the supervisor is gone.
[[nodiscard]] Result<std::optional<AgentMessage>> NextMessage(int socket, Fd* passed = nullptr);
[[nodiscard]] Result<> PostMessage(int socket, const AgentMessage& message, int fd = -1);
// Without waiting: false when the other side has to read first.
[[nodiscard]] Result<bool> TryPostMessage(int socket, const AgentMessage& message);

}  // namespace unmoor
