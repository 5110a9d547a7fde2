// See agent_fixture.h.
#include "agent_fixture.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <new>

#include <algorithm>

#include "agent/helper_protocol.h"
#include "agent/page_image.h"
#include "os/file.h"
#include "os/kernel_features.h"
#include "os/process_control.h"

namespace unmoor::testing_agent {

void AgentTest::SetUp() {
  if (OwnUid() != 0) GTEST_SKIP() << "needs root: the agent traces other processes";
  const KernelFeatures kernel = KernelFeatures::Probe();
  if (!kernel.Has(UffdFeature::kWpAsync) || !kernel.pagemap_scan || !kernel.procmap_query) {
    GTEST_SKIP()
        << "this kernel lacks WP_ASYNC userfaultfd, PAGEMAP_SCAN or PROCMAP_QUERY (6.11 has "
           "them all)";
  }
  ASSERT_TRUE(BecomeSubreaper());
  const auto directory = MakeTemporaryDirectory("/tmp", "unmoor-agent-test-");
  ASSERT_TRUE(directory);
  directory_ = *directory;
  ::setenv("UNMOOR_RUNTIME_DIR", (directory_ + "/run").c_str(), 1);
  void* shared =
      ::mmap(nullptr, 2 * kPageSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(shared, MAP_FAILED);
  signals_ = new (shared) Signals;
  remap_text_ = static_cast<char*>(shared) + kPageSize;
}

void AgentTest::TearDown() {
  if (directory_.empty()) return;
  // Agents end by themselves, shortly after their programs.
  const bool ended = WaitUntil([&] {
    while (::waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    return FindProcesses("unmoor-agent").empty() && FindProcesses("unmoor-helper").empty();
  });
  EXPECT_TRUE(HasFailure() || ended) << "an agent or helper is left";
  KillDescendants();
  EXPECT_TRUE(RemoveTree(directory_));
  ::munmap(signals_, 2 * kPageSize);
}

Pid AgentTest::StartSubject(const std::function<void()>& body) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    body();
    ::_exit(signals_->errors == 0 ? 0 : 1);
  }
  EXPECT_GT(pid, 0);
  return Pid{pid};
}

void AgentTest::AwaitReady(int step) {
  EXPECT_TRUE(WaitUntil([&] { return signals_->ready >= step || signals_->errors > 0; }));
  EXPECT_EQ(signals_->errors, 0) << signals_->first_error;
}

int AgentTest::AwaitEnd(Pid pid) {
  int status = -1;
  EXPECT_TRUE(WaitUntil([&] { return ::waitpid(pid.value, &status, WNOHANG) == pid.value; }))
      << "process " << pid.value << " does not end";
  return status;
}

void AgentTest::ExpectGoodEnd(Pid pid) {
  EXPECT_EQ(AwaitEnd(pid), 0);
  EXPECT_EQ(signals_->errors, 0) << signals_->first_error;
}

AgentOptions AgentTest::WithGuard(AgentOptions options) {
  const char* guard = std::getenv("UNMOOR_TEST_GUARD");
  if (guard != nullptr && std::string_view(guard) == "fault") options.guard = GuardPolicy::kFault;
  if (const char* log = std::getenv("UNMOOR_TEST_AGENT_LOG")) options.log_file = log;
  return options;
}

Pid AgentTest::StartRemap(Pid pid, const AgentOptions& options) {
  remap_text_[0] = 0;
  const pid_t command = ::fork();
  if (command == 0) {
    const auto report = RemapProcess(pid, WithGuard(options), {});
    const std::string text = report ? "" : report.error().message();
    text.copy(remap_text_, kPageSize - 1);
    remap_text_[std::min<size_t>(text.size(), kPageSize - 1)] = 0;
    ::_exit(report ? 0 : 1);
  }
  EXPECT_GT(command, 0);
  return Pid{command};
}

void AgentTest::WatchStopped(Pid pid, AgentOptions options) {
  ASSERT_TRUE(WaitUntil([&] {
    const auto process = ReadProcess(pid);
    return process && process->state == 'T';
  }));
  auto agent = WaitingAgent::Begin(WithGuard(std::move(options)), "");
  ASSERT_TRUE(agent) << agent.error().message();
  ASSERT_TRUE(agent->Started());
  ASSERT_TRUE(agent->Adopt({pid}, {}));
  ASSERT_TRUE(agent->LetRun());
  const auto runs = agent->AwaitRunning();
  ASSERT_TRUE(runs) << runs.error().message();
}

void AgentTest::LoadMachine(int processes) {
  for (int i = 0; i < processes; ++i) {
    const pid_t pid = ::fork();
    ASSERT_GE(pid, 0);
    if (pid != 0) continue;
    for (;;) asm volatile("");
  }
}

std::vector<Pid> AgentTest::FindProcesses(const std::string& name) {
  std::vector<Pid> found;
  const auto tree = ReadTree(OwnPid());
  if (!tree) return found;
  for (const Pid pid : *tree) {
    const auto process = ReadProcess(pid);
    if (process && process->name == name && process->state != 'Z') found.push_back(pid);
  }
  return found;
}

bool AgentTest::MapsImages(Pid pid) {
  const auto vmas = ReadMaps(pid);
  return !vmas || std::ranges::any_of(*vmas, MapsPageImage);
}

void AgentTest::ExpectNoTraces(Pid pid) {
  const auto vmas = ReadSmaps(pid);
  ASSERT_TRUE(vmas);
  for (const VmaInfo& vma : *vmas) {
    EXPECT_FALSE(vma.HasFlag("uw") || vma.HasFlag("um")) << fmt::format("{} is watched", vma.range);
    const bool code = vma.IsPrivateAnonymous() && vma.prot == (PROT_READ | PROT_EXEC) &&
                      vma.range.size().value == helper::kCodeSize;
    EXPECT_FALSE(code) << fmt::format("code of the helper at {}", vma.range);
    const bool staging = vma.range.begin.value >= uint64_t{1} << 44 &&
                         vma.range.end.value <= uint64_t{1} << 46 && vma.name.empty();
    EXPECT_FALSE(staging && vma.inode == 0 && vma.HasFlag("dc")) << "staging memory is left";
  }
  const auto children = ReadChildren(pid);
  ASSERT_TRUE(children);
  for (const Pid child : *children) {
    const auto process = ReadProcess(child);
    EXPECT_FALSE(process && process->name == "unmoor-helper") << "a helper is left";
  }
  const auto process = ReadProcess(pid);
  ASSERT_TRUE(process);
  EXPECT_EQ(process->tracer.value, 0);
}

void AgentTest::ExpectReady(Pid pid) {
  const auto status = QueryStatus(pid);
  ASSERT_TRUE(status) << status.error().message();
  EXPECT_EQ(status->status, Status::kReady) << status->reason;
  ExpectNoTraces(pid);
}

void AgentTest::ExpectBecomesReady(Pid pid, Nanos limit) {
  const auto status = WaitReady(pid, limit, {});
  ASSERT_TRUE(status) << status.error().message();
  EXPECT_EQ(status->status, Status::kReady) << status->reason;
}

std::vector<VmaInfo> AgentTest::VmasOf(Pid pid, VaddrRange range) {
  const auto vmas = ReadSmaps(pid);
  std::vector<VmaInfo> found;
  if (!vmas) return found;
  for (const VmaInfo& vma : *vmas) {
    if (vma.range.Overlaps(range)) found.push_back(vma);
  }
  return found;
}

}  // namespace unmoor::testing_agent
