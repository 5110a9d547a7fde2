// What the tests of the agent share: a temporary directory for images and progress files, subjects,
// the remap as a process of its own, and the promise that nothing is left afterwards.
//
// The test process is the subreaper of all it starts, agents included, so it sees what is left.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "agent/agent.h"
#include "os/procfs.h"
#include "subject.h"

namespace unmoor::testing_agent {

class AgentTest : public testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;

  // Runs `body` in a forked child, which exits 0 when it returns and has found nothing wrong.
  Pid StartSubject(const std::function<void()>& body);
  // Until the subject has said ready = `step`.
  void AwaitReady(int step);
  // Expects `pid` to exit 0 without having found anything wrong.
  void ExpectGoodEnd(Pid pid);
  // Wait status of a child of ours; fails the test when it does not end.
  int AwaitEnd(Pid pid);

  // With the guard that UNMOOR_TEST_GUARD names (freeze, fault), so that the same tests run under
  // either; `options` as they are without.
  static AgentOptions WithGuard(AgentOptions options);
  // RemapProcess in a process of its own; `message` of its end is in remap_text().
  Pid StartRemap(Pid pid, const AgentOptions& options);
  [[nodiscard]] const char* remap_text() const { return remap_text_; }
  // Starts the agent for a subject that has stopped itself, without remapping.
  void WatchStopped(Pid pid, AgentOptions options);

  // Busy children that keep other threads waiting for a core, until the test is over.
  void LoadMachine(int processes);
  // Living processes of ours with that comm.
  std::vector<Pid> FindProcesses(const std::string& name);
  [[nodiscard]] bool MapsImages(Pid pid);
  // Nothing in `pid` but what belongs to it: no helper, no staging, no watched memory.
  void ExpectNoTraces(Pid pid);
  void ExpectReady(Pid pid);
  // Waits for it.
  void ExpectBecomesReady(Pid pid, Nanos limit);
  // The VMAs of `memory` in `pid`.
  std::vector<VmaInfo> VmasOf(Pid pid, VaddrRange range);

  std::string directory_;
  Signals* signals_ = nullptr;
  char* remap_text_ = nullptr;
};

}  // namespace unmoor::testing_agent
