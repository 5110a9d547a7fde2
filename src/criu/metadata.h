// What CRIU's metadata says about the tasks of a checkpoint: the process tree and each task's VMAs.
//
// Plain values, read from inventory.img, pstree.img, core-<vpid>.img and mm-<vpid>.img. Process ids
// here are virtual ones, as the program saw them in its own PID namespace. Thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor::criu {

enum class TaskState { kAlive = 1, kDead = 2, kStopped = 3, kZombie = 6, kOther = 0 };

struct Task {
  uint32_t vpid = 0;
  uint32_t parent = 0;  // 0: the root
  uint32_t process_group = 0;
  uint32_t session = 0;
  std::vector<uint32_t> threads;  // virtual ids, the leader among them
  std::string name;               // comm
  TaskState state = TaskState::kOther;
  // Alive and stopped tasks have memory; zombies have none.
  [[nodiscard]] bool has_memory() const {
    return state == TaskState::kAlive || state == TaskState::kStopped;
  }
  // As a manifest has it.
  [[nodiscard]] std::string_view state_name() const {
    if (state == TaskState::kStopped) return "stopped";
    return has_memory() ? "running" : "zombie";
  }
};

// Parents before children; the root first.
[[nodiscard]] Result<std::vector<Task>> ReadTasks(const std::string& criu_directory);

// status bits of a VMA in mm images.
inline constexpr uint32_t kVmaRegular = 1u << 0;
inline constexpr uint32_t kVmaStack = 1u << 1;
inline constexpr uint32_t kVmaVsyscall = 1u << 2;
inline constexpr uint32_t kVmaVdso = 1u << 3;
inline constexpr uint32_t kVmaHeap = 1u << 5;
inline constexpr uint32_t kVmaFilePrivate = 1u << 6;
inline constexpr uint32_t kVmaFileShared = 1u << 7;
inline constexpr uint32_t kVmaAnonShared = 1u << 8;
inline constexpr uint32_t kVmaAnonPrivate = 1u << 9;
inline constexpr uint32_t kVmaSysvIpc = 1u << 10;
inline constexpr uint32_t kVmaSocket = 1u << 11;
inline constexpr uint32_t kVmaVvar = 1u << 12;
inline constexpr uint32_t kVmaAioRing = 1u << 13;
inline constexpr uint32_t kVmaMemfd = 1u << 14;
inline constexpr uint32_t kVmaShadowStack = 1u << 15;
inline constexpr uint32_t kVmaGuard = 1u << 16;
inline constexpr uint32_t kVmaUprobes = 1u << 17;
inline constexpr uint32_t kVmaPlugin = 1u << 27;

// One vma_entry.
struct Vma {
  VaddrRange range;
  uint64_t pgoff = 0;  // bytes
  uint64_t shmid = 0;
  uint32_t prot = 0;   // PROT_*
  uint32_t flags = 0;  // MAP_*
  uint32_t status = 0;
  uint64_t madv = 0;  // bit n: madvise(n) holds
};

// In the order of the image. kVmaGuard entries at the end are not VMAs but guard ranges over
// others.
[[nodiscard]] Result<std::vector<Vma>> ReadVmas(const std::string& criu_directory, uint32_t vpid);

// Why a VMA must never become a mapping of a page image; empty when it may.
[[nodiscard]] std::string_view WhyNotTakeable(const Vma& vma);
[[nodiscard]] inline bool IsTakeable(const Vma& vma) {
  return WhyNotTakeable(vma).empty();
}

}  // namespace unmoor::criu
