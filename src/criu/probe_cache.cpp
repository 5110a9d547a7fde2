// See probe_cache.h.
#include "criu/probe_cache.h"

#include <cstdlib>
#include <string_view>

#include "base/log.h"
#include "os/file.h"
#include "os/process_control.h"
#include "os/spawn.h"

namespace unmoor::criu {
namespace {

constexpr char kDirectory[] = "/run";
constexpr char kCriusFile[] = "/run/criu.kdat";
constexpr std::string_view kOurPrefix = "unmoor-criu-";
constexpr std::string_view kOurSuffix = ".kdat";

// Runs inside the mount namespace: "$@" is criu. The cache goes to stdout.
constexpr char kScript[] =
    "mount -t tmpfs -o mode=700 tmpfs /run && { timeout -s KILL 20 \"$@\" check >/dev/null 2>&1; "
    "exec cat /run/criu.kdat; } 2>/dev/null";

bool SameFile(const struct stat& a, const struct stat& b) {
  return a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

// Takes /run/criu.kdat away if it is the file at `ours`.
void Unlink(const std::string& ours) {
  const Result<struct stat> theirs = Stat(kCriusFile);
  const Result<struct stat> mine = Stat(ours);
  if (theirs && mine && SameFile(*theirs, *mine)) (void)RemoveFile(kCriusFile);
}

Result<std::string> BootId() {
  UNMOOR_ASSIGN(std::string boot, ReadFile("/proc/sys/kernel/random/boot_id"));
  boot.resize(boot.find_last_not_of('\n') + 1);
  return boot;
}

Result<std::string> NameFor(const std::string& boot, const std::string& binary) {
  UNMOOR_ASSIGN(const struct stat info, Stat(binary));
  return fmt::format("{}/{}{}-{:x}-{:x}-{:x}-{:x}{}", kDirectory, kOurPrefix, boot, info.st_dev,
                     info.st_ino, info.st_mtim.tv_sec, info.st_size, kOurSuffix);
}

void RemoveEarlierBoots(const std::string& boot) {
  const auto names = ListDirectory(kDirectory);
  if (!names) return;
  for (const std::string& name : *names) {
    if (!name.starts_with(kOurPrefix) || !name.ends_with(kOurSuffix)) continue;
    if (name.find(boot) != std::string::npos) continue;
    const std::string path = std::string(kDirectory) + "/" + name;
    Unlink(path);
    (void)RemoveFile(path);
  }
}

Result<> Make(const std::vector<std::string>& command, const std::string& path) {
  std::vector<std::string> argv = {"unshare", "--mount", "--propagation", "private",
                                   "sh",      "-c",      kScript,         "sh"};
  argv.insert(argv.end(), command.begin(), command.end());
  UNMOOR_ASSIGN(const CommandOutput output, RunAndCollect(argv));
  // Where it cannot be made (no mount namespaces, say), an empty file keeps us from trying again.
  const std::string cache = output.status.ok() ? output.text : std::string();
  const std::string temporary = fmt::format("{}.{}", path, OwnPid().value);
  UNMOOR_TRY(WriteFile(temporary, cache, 0600));
  return Rename(temporary, path);
}

Result<std::string> TryInstall(const std::vector<std::string>& command, const std::string& binary) {
  UNMOOR_ASSIGN(const bool tmpfs, IsTmpfs(kDirectory));
  if (tmpfs) return std::string();  // criu does it itself
  UNMOOR_ASSIGN(const std::string boot, BootId());
  UNMOOR_ASSIGN(std::string ours, NameFor(boot, binary));
  if (!Exists(ours)) {
    RemoveEarlierBoots(boot);
    UNMOOR_TRY(Make(command, ours));
  }
  UNMOOR_ASSIGN(const struct stat info, Stat(ours));
  if (info.st_size == 0) return MachineError("it left no cache when asked to");
  if (info.st_uid != 0) return MachineError("{} is not root's", ours);
  const Result<> linked = HardLink(ours, kCriusFile);
  if (linked) return ours;
  // A run beside us, or one that was killed, has it there already.
  const Result<struct stat> there = Stat(kCriusFile);
  if (there && SameFile(*there, info)) return ours;
  return Failure(linked.error());
}

}  // namespace

ProbeCache ProbeCache::Install(const std::vector<std::string>& command, const std::string& binary) {
  const char* const wish = std::getenv("UNMOOR_PROBE_CACHE");
  if (wish != nullptr && std::string_view(wish) == "off") return ProbeCache(std::string());
  Result<std::string> ours = TryInstall(command, binary);
  if (!ours) {
    spdlog::debug("criu probes the kernel at each start: {}", ours.error().message());
    return ProbeCache(std::string());
  }
  return ProbeCache(*std::move(ours));
}

ProbeCache::~ProbeCache() {
  if (!ours_.empty()) Unlink(ours_);
}

}  // namespace unmoor::criu
