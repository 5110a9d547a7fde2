// See memory_room.h.
#include "os/memory_room.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <optional>
#include <sstream>

#include "os/file.h"
#include "os/process_control.h"

namespace unmoor {
namespace {

constexpr Nanos kLookAgain(20'000'000);
constexpr uint64_t kLeastReserve = uint64_t{4} << 20;
constexpr uint64_t kMostReserve = uint64_t{64} << 20;
constexpr uint64_t kUnlimited = uint64_t{1} << 62;  // and above, in version 1

struct Mount {
  std::string root, place;
  bool unified = false;
};

bool HasWord(const std::string& list, const std::string& word) {
  return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

// Of control groups that can limit memory.
std::vector<Mount> FindMounts(const std::string& text) {
  std::vector<Mount> mounts;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string skipped, type, source, options;
    Mount mount;
    words >> skipped >> skipped >> skipped >> mount.root >> mount.place;
    while (words >> skipped && skipped != "-") continue;
    words >> type >> source >> options;
    mount.unified = type == "cgroup2";
    if (mount.unified || (type == "cgroup" && HasWord(options, "memory"))) mounts.push_back(mount);
  }
  return mounts;
}

void AddWithThoseAbove(const Mount& mount, const std::string& path,
                       std::vector<MemoryGroup>& groups) {
  const std::string root = mount.root == "/" ? "" : mount.root;
  if (!(path + "/").starts_with(root + "/")) return;  // not shown here
  for (std::string below = path.substr(root.size()); !below.empty() && below != "/";
       below.resize(below.rfind('/'))) {
    groups.push_back({mount.place + below, mount.unified});
  }
  groups.push_back({mount.place, mount.unified});
}

// A number in a file of its own; nothing when there is none, or "max".
std::optional<uint64_t> ReadNumber(const std::string& path) {
  const auto text = ReadFile(path);
  if (!text || text->empty() || text->front() < '0' || text->front() > '9') return std::nullopt;
  return std::strtoull(text->c_str(), nullptr, 10);
}

// The sum of the lines "name value" with these names.
uint64_t SumOf(const std::string& text, std::initializer_list<std::string_view> names) {
  uint64_t sum = 0;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name;
    uint64_t value = 0;
    if (words >> name >> value && std::ranges::find(names, name) != names.end()) sum += value;
  }
  return sum;
}

std::optional<uint64_t> LimitOf(const MemoryGroup& group) {
  if (!group.unified) {
    const auto limit = ReadNumber(group.directory + "/memory.limit_in_bytes");
    return limit && *limit >= kUnlimited ? std::nullopt : limit;
  }
  // Above the high mark a program is slowed down to a crawl: no better for it than an end.
  const auto high = ReadNumber(group.directory + "/memory.high");
  const auto most = ReadNumber(group.directory + "/memory.max");
  return high && most ? std::min(high, most) : high ? high : most;
}

// Up to the limit, with what is used for files' pages.
std::optional<uint64_t> LeftIn(const MemoryGroup& group, uint64_t limit) {
  const auto used =
      ReadNumber(group.directory + (group.unified ? "/memory.current" : "/memory.usage_in_bytes"));
  const auto details = ReadFile(group.directory + "/memory.stat");
  if (!used || !details) return std::nullopt;
  const uint64_t files = group.unified
                             ? SumOf(*details, {"active_file", "inactive_file"})
                             : SumOf(*details, {"total_active_file", "total_inactive_file"});
  const uint64_t unmovable = *used > files ? *used - files : 0;
  return limit > unmovable ? limit - unmovable : 0;
}

}  // namespace

std::vector<MemoryGroup> FindMemoryGroups(const std::string& memberships,
                                          const std::string& mounts) {
  std::vector<MemoryGroup> groups;
  const std::vector<Mount> found = FindMounts(mounts);
  std::istringstream lines(memberships);
  for (std::string line; std::getline(lines, line);) {  // number:controllers:path
    const size_t first = line.find(':');
    const size_t second = line.find(':', first == std::string::npos ? first : first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool unified = controllers.empty();
    if (!unified && !HasWord(controllers, "memory")) continue;
    const auto mount = std::ranges::find(found, unified, &Mount::unified);
    if (mount != found.end()) AddWithThoseAbove(*mount, line.substr(second + 1), groups);
  }
  return groups;
}

void MemoryRoom::FindGroups() {
  const std::lock_guard lock(mutex_);
  const auto memberships = ReadFile(fmt::format("/proc/{}/cgroup", pid_.value));
  const auto mounts = ReadFile("/proc/self/mountinfo");
  groups_.clear();
  if (memberships && mounts) groups_ = FindMemoryGroups(*memberships, *mounts);
  std::erase_if(groups_, [](const MemoryGroup& group) { return !LimitOf(group); });
  looked_ = Nanos();
}

Result<> MemoryRoom::Take(Bytes more) {
  const std::lock_guard lock(mutex_);
  if (more > left_ || MonotonicNow() - looked_ > kLookAgain) Look();
  if (more > left_) {
    return Failure(
        Error(ErrorKind::kMachine, ENOMEM,
              fmt::format("{} has no more than {} of memory to spare", whose_, HumanBytes(left_))));
  }
  left_ -= more;
  return {};
}

Result<> MemoryRoom::CanTake(Bytes more) {
  UNMOOR_TRY(Take(more));
  const std::lock_guard lock(mutex_);
  left_ += more;
  return {};
}

void MemoryRoom::Look() {
  looked_ = MonotonicNow();
  left_ = Bytes(kUnlimited);
  const auto note = [&](uint64_t left, uint64_t limit, const std::string& whose) {
    const uint64_t reserve = std::clamp(limit / 32, kLeastReserve, kMostReserve);
    const Bytes spare(left > reserve ? left - reserve : 0);
    if (spare >= left_) return;
    left_ = spare;
    whose_ = whose;
  };
  if (const auto machine = ReadFile("/proc/meminfo")) {
    note(SumOf(*machine, {"MemAvailable:", "SwapFree:"}) << 10,
         SumOf(*machine, {"MemTotal:"}) << 10, "the machine");
  }
  for (const MemoryGroup& group : groups_) {
    const auto limit = LimitOf(group);
    const auto left = limit ? LeftIn(group, *limit) : std::nullopt;
    if (left) note(*left, *limit, "the control group " + group.directory);
  }
}

}  // namespace unmoor
