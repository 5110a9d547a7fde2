// KernelFeatures: what this kernel, and our rights on it, allow. Probed once, passed down by value.
//
// Probe() asks the kernel itself (it opens a userfaultfd, issues the ioctls, traces a child of its
// own) instead of comparing versions. It takes about a millisecond and leaves nothing behind. Not
// thread-safe with regard to a SIGCHLD handler of the caller; call it before starting threads.
//
// Costs and uses of each feature: ../shared/facts/kernel.md and docs/cli.md ("check").
#pragma once

#include <cstdint>
#include <string>

#include "base/result.h"

namespace unmoor {

// What UFFDIO_API reports (linux/userfaultfd.h); only the bits unmoor uses.
enum class UffdFeature : uint64_t {
  kPagefaultWp = 1u << 0,
  kEventFork = 1u << 1,
  kEventRemap = 1u << 2,
  kEventRemove = 1u << 3,
  kEventUnmap = 1u << 6,
  kThreadId = 1u << 8,
  kWpUnpopulated = 1u << 13,
  kWpAsync = 1u << 15,
  kMove = 1u << 16,
};

enum class ThpSetting { kNever, kMadvise, kAlways, kAbsent };

struct Capabilities {
  bool sys_ptrace = false;
  bool checkpoint_restore = false;
  bool sys_admin = false;
  bool sys_resource = false;
};

struct KernelFeatures {
  std::string release;  // "6.18.44-…"
  std::string machine;  // "x86_64"
  int major = 0;
  int minor = 0;

  bool uffd_system_call = false;  // userfaultfd(2), kernel faults included
  bool uffd_device = false;       // /dev/userfaultfd
  uint64_t uffd_features = 0;     // UffdFeature bits; 0 without userfaultfd
  bool pagemap_scan = false;
  bool procmap_query = false;
  bool ptrace_seize = false;  // of a child
  int yama_scope = -1;        // kernel.yama.ptrace_scope; -1: no Yama
  bool soft_dirty = false;
  bool named_memory = false;  // PR_SET_VMA_ANON_NAME
  ThpSetting thp = ThpSetting::kAbsent;
  bool run_is_tmpfs = false;  // criu keeps its probe cache only there
  Capabilities capabilities;

  [[nodiscard]] bool HasUffd() const { return uffd_system_call || uffd_device; }
  [[nodiscard]] bool Has(UffdFeature feature) const {
    return (uffd_features & static_cast<uint64_t>(feature)) != 0;
  }
  [[nodiscard]] bool AtLeast(int want_major, int want_minor) const {
    return major > want_major || (major == want_major && minor >= want_minor);
  }

  [[nodiscard]] static KernelFeatures Probe();
};

[[nodiscard]] const char* ToString(ThpSetting setting);
// prctl, linux/prctl.h, from 5.17.
inline constexpr uint64_t kPrSetVma = 0x53564d41, kPrSetVmaAnonName = 0;
// Whether anonymous memory can have names here (CONFIG_ANON_VMA_NAME): named_memory, by itself.
[[nodiscard]] bool CanNameMemory();

}  // namespace unmoor
