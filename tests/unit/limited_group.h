// For tests: a memory control group below our own, with a limit; gone with this.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <string>

#include "os/file.h"
#include "os/memory_room.h"

namespace unmoor {

class LimitedGroup {
 public:
  explicit LimitedGroup(uint64_t limit) {
    const auto memberships = ReadFile("/proc/self/cgroup");
    const auto mounts = ReadFile("/proc/self/mountinfo");
    if (!memberships || !mounts) return;
    const auto groups = FindMemoryGroups(*memberships, *mounts);
    if (groups.empty()) return;
    group_ = groups.front();
    group_.directory += "/unmoor-test-" + std::to_string(::getpid());
    made_ = ::mkdir(group_.directory.c_str(), 0755) == 0;
    set_ = made_ && SetLimit(limit);
  }
  LimitedGroup(const LimitedGroup&) = delete;
  LimitedGroup& operator=(const LimitedGroup&) = delete;
  // Those who entered it must have ended.
  ~LimitedGroup() {
    if (made_) ::rmdir(group_.directory.c_str());
  }

  // False: the machine does not allow it.
  [[nodiscard]] bool made() const { return set_; }
  [[nodiscard]] const std::string& directory() const { return group_.directory; }
  [[nodiscard]] bool SetLimit(uint64_t limit) const {
    return Write(group_.unified ? "memory.max" : "memory.limit_in_bytes", limit);
  }
  // The calling process.
  [[nodiscard]] bool Enter() const {
    return Write("cgroup.procs", static_cast<uint64_t>(::getpid()));
  }

 private:
  [[nodiscard]] bool Write(const char* file, uint64_t value) const {
    std::ofstream out(group_.directory + "/" + file);
    return out.is_open() && (out << value << std::flush).good();
  }

  MemoryGroup group_;
  bool made_ = false;
  bool set_ = false;
};

}  // namespace unmoor
