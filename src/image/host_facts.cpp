// What a checkpoint's manifest records of the machine, read afresh and compared. See manifest.h.
#include <algorithm>
#include <iterator>
#include <sstream>

#include "image/manifest.h"
#include "os/file.h"

namespace unmoor {
namespace {

// The words after "flags : " of the first CPU, sorted, each once.
std::vector<std::string> ParseFlags(const std::string& cpuinfo) {
  std::istringstream lines(cpuinfo);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("flags")) continue;
    std::istringstream words(line.substr(std::min(line.size(), line.find(':') + 1)));
    std::vector<std::string> flags{std::istream_iterator<std::string>(words), {}};
    std::ranges::sort(flags);
    const auto twice = std::ranges::unique(flags);
    flags.erase(twice.begin(), twice.end());
    return flags;
  }
  return {};
}

std::string Join(const std::vector<std::string>& words) {
  constexpr size_t kShown = 8;
  std::string text;
  for (size_t i = 0; i < std::min(kShown, words.size()); ++i) {
    text += (i == 0 ? "" : " ") + words[i];
  }
  if (words.size() > kShown) text += fmt::format(" and {} more", words.size() - kShown);
  return text;
}

}  // namespace

Result<HostFacts> ReadHostFacts() {
  HostFacts host;
  UNMOOR_ASSIGN(host.kernel_release, ReadFile("/proc/sys/kernel/osrelease"));
  while (host.kernel_release.ends_with('\n')) host.kernel_release.pop_back();
  UNMOOR_ASSIGN(const std::string cpuinfo, ReadFile("/proc/cpuinfo"));
  host.cpu_features = ParseFlags(cpuinfo);
  return host;
}

Result<> CheckHost(const Manifest& manifest, const HostFacts& host) {
  if (manifest.page_size != host.page_size) {
    return UserError("the checkpoint has pages of {} bytes, this machine of {}", manifest.page_size,
                     host.page_size);
  }
  std::vector<std::string> missing;
  std::ranges::set_difference(manifest.cpu_features, host.cpu_features,
                              std::back_inserter(missing));
  if (missing.empty()) return {};
  return UserError(
      "the checkpoint was made on a CPU with features this one lacks: {}; restore it on a machine "
      "that has them",
      Join(missing));
}

}  // namespace unmoor
