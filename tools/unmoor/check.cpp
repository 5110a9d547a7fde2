// `unmoor check`: what works on this machine, what its absence costs, what to do about it.
//
// The list is made from KernelFeatures and the criu found; it is one table, printed or as JSON.
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "criu/runner.h"
#include "os/kernel_features.h"
#include "os/spawn.h"

namespace unmoor::cli {
namespace {

struct CheckArguments {
  std::string criu;
  bool json = false;
};

constexpr char kFooter[] =
    "\n[ok] works   [--] missing, unmoor does without   [!!] missing and needed\n"
    "\nExamples:\n"
    "  unmoor check\n"
    "  unmoor check --json | jq '.items[] | select(.works | not)'\n"
    "\nExit codes: 0 everything needed works, 1 something needed is missing, 2 wrong use.\n";

struct Item {
  std::string name;
  bool works = false;
  bool needed = true;
  std::string detail;  // what was found
  std::string cost;    // missing: what that costs
  std::string advice;  // missing: what to do
};

Item UffdItem(const KernelFeatures& kernel, const char* name, UffdFeature feature, bool needed,
              const char* cost, const char* since) {
  return {fmt::format("userfaultfd {}", name),          kernel.Has(feature), needed, "", cost,
          fmt::format("use a kernel from {} on", since)};
}

void AddUffd(std::vector<Item>& items, const KernelFeatures& kernel) {
  items.push_back({"userfaultfd", kernel.HasUffd(), true,
                   kernel.uffd_system_call && kernel.uffd_device
                       ? "system call and /dev/userfaultfd"
                   : kernel.uffd_system_call ? "system call"
                                             : "/dev/userfaultfd",
                   "no restore by mapping: memory given back by the program would not read zero",
                   "run as root, or allow /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1"});
  constexpr const char* kEvents =
      "the agent would not learn of memory the program gives back, moves or unmaps";
  items.push_back(
      UffdItem(kernel, "EVENT_REMOVE", UffdFeature::kEventRemove, true, kEvents, "4.11"));
  items.push_back(UffdItem(kernel, "EVENT_UNMAP", UffdFeature::kEventUnmap, true, kEvents, "4.11"));
  items.push_back(UffdItem(kernel, "EVENT_REMAP", UffdFeature::kEventRemap, true, kEvents, "4.11"));
  items.push_back(UffdItem(kernel, "EVENT_FORK", UffdFeature::kEventFork, true,
                           "children forked during a remap would not be followed", "4.11"));
  items.push_back(
      UffdItem(kernel, "WP_ASYNC", UffdFeature::kWpAsync, true,
               "no mapping can be watched: it is the only mode private file mappings have", "6.7"));
  items.push_back(UffdItem(kernel, "MOVE", UffdFeature::kMove, false,
                           "the remap is slower or without huge "
                           "pages",
                           "6.8"));
}

void AddKernel(std::vector<Item>& items, const KernelFeatures& kernel) {
  items.push_back({"kernel", kernel.AtLeast(6, 11), true, kernel.release,
                   "userfaultfd WP_ASYNC, PAGEMAP_SCAN or PROCMAP_QUERY are missing",
                   "use 6.11 or later"});
  items.push_back({"machine", kernel.machine == "x86_64", true, kernel.machine,
                   "the code carried into programs exists for x86-64 only", ""});
  AddUffd(items, kernel);
  items.push_back({"PAGEMAP_SCAN", kernel.pagemap_scan, true, "", "written pages cannot be found",
                   "use a kernel from 6.7 on"});
  items.push_back({"PROCMAP_QUERY", kernel.procmap_query, true, "",
                   "mappings cannot be compared within a window", "use a kernel from 6.11 on"});
  items.push_back({"ptrace", kernel.ptrace_seize, true,
                   kernel.yama_scope < 0
                       ? "no Yama restriction"
                       : fmt::format("kernel.yama.ptrace_scope={}", kernel.yama_scope),
                   "programs cannot be frozen", "run as root, or set kernel.yama.ptrace_scope=0"});
  const bool thp = kernel.thp == ThpSetting::kAlways || kernel.thp == ThpSetting::kMadvise;
  items.push_back({"huge pages (THP)", thp, false, ToString(kernel.thp),
                   "remapped memory is of small pages: a slower remap, more TLB misses",
                   "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"});
  items.push_back({"names of memory", kernel.named_memory, false, "PR_SET_VMA_ANON_NAME",
                   "no program here has named its memory, so no name can get lost",
                   "nothing to do (CONFIG_ANON_VMA_NAME)"});
  items.push_back({"soft-dirty", kernel.soft_dirty, false, "",
                   "criu --track-mem and pre-dump are not available; unmoor does not use them",
                   "nothing to do"});
}

void AddRights(std::vector<Item>& items, const Capabilities& have) {
  items.push_back({"CAP_SYS_PTRACE", have.sys_ptrace, true, "",
                   "only own programs can be dumped and remapped", "run as root"});
  items.push_back({"CAP_CHECKPOINT_RESTORE", have.checkpoint_restore || have.sys_admin, true,
                   have.checkpoint_restore ? "" : "covered by CAP_SYS_ADMIN",
                   "process ids cannot be restored", "run as root"});
  items.push_back({"CAP_SYS_ADMIN", have.sys_admin, true, "",
                   "criu works with limits only (its --unprivileged)", "run as root"});
  items.push_back({"CAP_SYS_RESOURCE", have.sys_resource, false, "",
                   "programs of other users cannot be dumped (criu: \"Can't get rlimit\"), limits "
                   "cannot be raised",
                   "give the container CAP_SYS_RESOURCE, or run the program as root"});
}

// The last line of `criu check` that says something.
std::string LastLine(const std::string& text) {
  const size_t end = text.find_last_not_of(" \n");
  if (end == std::string::npos) return {};
  const size_t begin = text.rfind('\n', end);
  const size_t from = begin == std::string::npos ? 0 : begin + 1;
  return text.substr(from, end + 1 - from);
}

void AddCriu(std::vector<Item>& items, const KernelFeatures& kernel, const std::string& option) {
  const auto criu = criu::FindCriu(option.empty() ? std::nullopt : std::optional(option),
                                   criu::VersionCheck::kNow);
  if (!criu) {
    items.push_back({"criu", false, true, "", criu.error().message(),
                     "tools/setup fetches one; or --criu PATH, or UNMOOR_CRIU"});
    return;
  }
  items.push_back(
      {"criu", true, true,
       fmt::format("{} ({})", criu->version ? criu::ToString(*criu->version) : "?", criu->path), "",
       ""});
  const auto check = RunAndCollect({criu->path, "check"});
  items.push_back({"criu check", check && check->status.ok(), true,
                   check ? LastLine(check->text) : check.error().message(),
                   check ? LastLine(check->text) : "criu could not be run",
                   fmt::format("run '{} check' and follow what it says", criu->path)});
  items.push_back({"criu's probe cache", true, false,
                   kernel.run_is_tmpfs ? "criu's own: /run is a tmpfs"
                                       : "ours: /run is not a tmpfs, where criu keeps none",
                   "", ""});
}

int RunCheck(const CheckArguments& arguments) {
  const KernelFeatures kernel = KernelFeatures::Probe();
  std::vector<Item> items;
  AddKernel(items, kernel);
  AddRights(items, kernel.capabilities);
  AddCriu(items, kernel, arguments.criu);

  bool usable = true;
  nlohmann::json list = nlohmann::json::array();
  std::string text;
  for (const Item& item : items) {
    if (item.needed && !item.works) usable = false;
    list.push_back({{"name", item.name},
                    {"works", item.works},
                    {"needed", item.needed},
                    {"detail", item.detail},
                    {"cost", item.works ? "" : item.cost},
                    {"advice", item.works ? "" : item.advice}});
    text += fmt::format("{} {:<26} {}\n",
                        item.works    ? "[ok]"
                        : item.needed ? "[!!]"
                                      : "[--]",
                        item.name, item.works ? item.detail : "missing: " + item.cost);
    if (!item.works && !item.advice.empty()) text += fmt::format("{:32}do: {}\n", "", item.advice);
  }
  if (arguments.json) {
    PrintJson({{"usable", usable}, {"kernel", kernel.release}, {"items", std::move(list)}});
  } else {
    text += usable ? "everything needed works\n" : "something needed is missing, see [!!] above\n";
    Print(text);
  }
  return usable ? kExitSuccess : kExitMachine;
}

}  // namespace

Action ConfigureCheck(CLI::App& app) {
  const auto arguments = std::make_shared<CheckArguments>();
  SetUsage(app, "Usage: unmoor check [--criu PATH] [--json]");
  app.add_option("--criu", arguments->criu, "The criu to check")->option_text("PATH");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(kFooter);
  return [arguments](const Invocation&) { return RunCheck(*arguments); };
}

}  // namespace unmoor::cli
