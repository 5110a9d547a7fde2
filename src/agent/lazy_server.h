// The lazy server: brings the memory of programs that `criu restore --lazy-pages` has restored.
//
// A pair of detached processes. The *server* does everything: it is criu's lazy-pages daemon,
// places pages somebody waits for, brings all others in the background, keeps the progress files
// and answers the command. The *keeper* only waits for its end. Both have one table of descriptors,
// so that every userfaultfd outlives either of them, those of forked children from the moment they
// exist; and one journal (lazy/journal.h). If one dies the other replaces it:
//
//   server dies  the keeper goes on as server, from the journal, and starts a keeper. Where the
//                server died between reading an event and recording it, or before the program ran,
//                what is missing cannot be known: the program is ended, and the log and `unmoor
//                status` say why.
//   keeper dies  the server starts another.
//
// Nobody ever reads zeros where there should be pages, but for both dying at once. The program is
// also ended when it touches a page that is damaged in the image. One thread does all this; others
// only read ahead for it (lazy/verified_blocks.h), and are stopped where it forks. See agent.h.
#pragma once

#include <string>

#include "agent/agent.h"
#include "agent/supervisor.h"
#include "base/result.h"
#include "lazy/state.h"

namespace unmoor {

// Our end of its socket: the messages are a supervisor's, kExpect passes criu's listening socket.
[[nodiscard]] Result<SupervisorHandle> StartLazyServer(const LazyImage& image,
                                                       const AgentOptions& options,
                                                       const std::string& view);

}  // namespace unmoor
