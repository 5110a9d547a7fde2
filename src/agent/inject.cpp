// See inject.h.
#include "agent/inject.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "agent/helper_image.h"
#include "agent/helper_protocol.h"
#include "agent/name_memory.h"
#include "base/log.h"
#include "os/kernel_features.h"
#include "os/procfs.h"
#include "os/remote_memory.h"

namespace unmoor {
namespace {

// The address of a `syscall` instruction that the program maps executable: the vDSO has one, and so
// has every libc.
Result<Vaddr> FindSyscallInstruction(Pid pid, std::span<const VmaInfo> vmas) {
  for (const bool in_vdso : {true, false}) {
    for (const VmaInfo& vma : vmas) {
      if ((vma.name == "[vdso]") != in_vdso) continue;
      if ((vma.prot & PROT_EXEC) == 0 || vma.name == "[vsyscall]") continue;
      std::vector<std::byte> code(std::min<uint64_t>(vma.range.size().value, 4 << 20));
      if (!ReadMemory(pid, vma.range.begin, code)) continue;
      for (size_t i = 0; i + 1 < code.size(); ++i) {
        if (code[i] == std::byte{0x0f} && code[i + 1] == std::byte{0x05}) {
          return vma.range.begin + Bytes(i);
        }
      }
    }
  }
  return MachineError("process {} maps no system call instruction", pid.value);
}

// A thread whose registers may be borrowed: best one inside a system call; never one inside a
// restartable sequence.
Result<StoppedThread*> ChooseThread(std::span<StoppedThread> stopped) {
  StoppedThread* chosen = nullptr;
  for (StoppedThread& thread : stopped) {
    if (thread.Poll() != StoppedThread::State::kStopped || thread.has_signal()) continue;
    UNMOOR_ASSIGN(const user_regs_struct registers, thread.Registers());
    if (StoppedThread::InSystemCall(registers)) return &thread;
    if (chosen == nullptr && !thread.InRestartableSequence()) chosen = &thread;
  }
  if (chosen != nullptr) return chosen;
  return Failure(Error(ErrorKind::kMachine, EAGAIN, "no thread can be borrowed just now"));
}

// The borrowed thread: begins on construction, ends when it goes out of scope.
class Borrowed {
 public:
  static Result<Borrowed> From(Pid pid, std::span<StoppedThread> stopped) {
    UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid));
    return From(pid, stopped, vmas);
  }
  static Result<Borrowed> From(Pid pid, std::span<StoppedThread> stopped,
                               std::span<const VmaInfo> vmas) {
    UNMOOR_ASSIGN(const Vaddr instruction, FindSyscallInstruction(pid, vmas));
    UNMOOR_ASSIGN(StoppedThread * thread, ChooseThread(stopped));
    UNMOOR_TRY(thread->BeginRemote());
    return Borrowed(thread, instruction);
  }
  Borrowed(Borrowed&& other) noexcept
      : thread_(std::exchange(other.thread_, nullptr)), instruction_(other.instruction_) {}
  Borrowed& operator=(Borrowed&&) = delete;
  ~Borrowed() {
    if (thread_ != nullptr) (void)thread_->EndRemote();
  }

  Result<uint64_t> Call(const char* name, uint64_t number, std::array<uint64_t, 6> args) {
    UNMOOR_ASSIGN(const int64_t result, thread_->RunRemote(instruction_, number, args));
    if (result >= 0 || result < -4095) return static_cast<uint64_t>(result);
    return SystemError(static_cast<int>(-result), fmt::format("{} inside the program", name));
  }
  StoppedThread& thread() { return *thread_; }

 private:
  Borrowed(StoppedThread* thread, Vaddr instruction) : thread_(thread), instruction_(instruction) {}
  StoppedThread* thread_;
  Vaddr instruction_;
};

Result<> WriteHelper(Pid pid, Vaddr region) {
  UNMOOR_CHECK(HelperImage().size() <= helper::kCodeSize);
  UNMOOR_TRY(ForceWriteMemory(pid, region, HelperImage()));
  struct {
    char magic[16] = {};
    uint32_t version = helper::kProtocolVersion;
  } head;
  std::memcpy(head.magic, helper::kMagic, sizeof(head.magic));
  const Vaddr data = region + Bytes(helper::kCodeSize);
  UNMOOR_TRY(ForceWriteMemory(pid, data, std::as_bytes(std::span(&head, 1))));
  const uint64_t on_stack[] = {data.value, helper::kRegionSize - helper::kCodeSize};
  return ForceWriteMemory(pid, region + Bytes(helper::kRegionSize - 64),
                          std::as_bytes(std::span(on_stack)));
}

Result<Pid> FindChildNamed(Pid pid, int pid_in_program) {
  UNMOOR_ASSIGN(const std::vector<Pid> children, ReadChildren(pid));
  for (const Pid child : children) {
    const auto info = ReadProcess(child);
    if (info && !info->ns_pids.empty() && info->ns_pids.back() == pid_in_program) return child;
  }
  return MachineError("the helper of process {} vanished", pid.value);
}

}  // namespace

Result<HelperProcess> InjectHelper(Pid pid, std::span<StoppedThread> stopped,
                                   std::span<const VmaInfo> vmas, bool nested) {
  UNMOOR_ASSIGN(Borrowed borrowed, Borrowed::From(pid, stopped, vmas));
  UNMOOR_ASSIGN(const uint64_t region_address,
                borrowed.Call("mmap", SYS_mmap,
                              {0, helper::kRegionSize, PROT_READ | PROT_EXEC,
                               MAP_PRIVATE | MAP_ANONYMOUS, ~uint64_t{0}, 0}));
  const Vaddr region(region_address);
  const auto give_back = [&](const Error& error) -> Failure {
    (void)borrowed.Call("munmap", SYS_munmap, {region.value, helper::kRegionSize, 0, 0, 0, 0});
    return Failure(error);
  };
  if (const auto written = WriteHelper(pid, region); !written) return give_back(written.error());
  const uint64_t stack_top = region.value + helper::kRegionSize - 64;
  const auto spawned =
      borrowed.thread().RunRemote(region + Bytes(kHelperSpawnOffset), SYS_clone,
                                  {CLONE_VM | CLONE_UNTRACED, stack_top, 0, 0, 0, 0});
  if (!spawned) return Failure(spawned.error());
  if (*spawned < 0) {
    return give_back(SystemError(static_cast<int>(-*spawned), "clone inside the program").value());
  }
  if (!nested) return HelperProcess{Pid{static_cast<int>(*spawned)}, region};
  UNMOOR_ASSIGN(const Pid helper, FindChildNamed(pid, static_cast<int>(*spawned)));
  return HelperProcess{helper, region};
}

Result<> InjectWatch(Pid pid, const HelperProcess& helper, std::span<StoppedThread> stopped) {
  const Vaddr data = helper.region + Bytes(helper::kCodeSize);
  const Vaddr stack_top =
      helper.region + Bytes(helper::kCodeSize + helper::kDataSize + helper::kWatchStackSize - 64);
  const uint64_t pointer = data.value;
  UNMOOR_TRY(WriteMemory(pid, stack_top, std::as_bytes(std::span(&pointer, 1))));
  UNMOOR_ASSIGN(Borrowed borrowed, Borrowed::From(pid, stopped));
  // Without CLONE_FILES: the watch holds no descriptor, and none of its own is the program's. Its
  // signals are blocked as those of the borrowed thread are while it runs the call.
  constexpr uint64_t kFlags = CLONE_VM | CLONE_FS | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
                              CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID | CLONE_UNTRACED;
  const uint64_t id = data.value + offsetof(helper::Data, watch_thread);
  UNMOOR_ASSIGN(const int64_t made,
                borrowed.thread().RunRemote(helper.region + Bytes(kWatchSpawnOffset), SYS_clone,
                                            {kFlags, stack_top.value, id, id, 0, 0}));
  if (made < 0) return SystemError(static_cast<int>(-made), "clone inside the program");
  return {};
}

namespace {

// The watch has normally ended with its helper; one that job control has stopped is made to exit.
Result<> EndWatch(Pid pid, std::span<StoppedThread> stopped, std::span<const Leftover> leftovers) {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid));
  UNMOOR_ASSIGN(const Vaddr instruction, FindSyscallInstruction(pid, vmas));
  for (StoppedThread& thread : stopped) {
    if (thread.Poll() != StoppedThread::State::kStopped) continue;
    UNMOOR_ASSIGN(const user_regs_struct registers, thread.Registers());
    for (const Leftover& leftover : leftovers) {
      const VaddrRange region{leftover.region, leftover.region + Bytes(helper::kRegionSize)};
      if (!region.Contains(Vaddr(registers.rip))) continue;
      uint32_t state = 0;
      int32_t watch = 0;
      const Vaddr data = leftover.region + Bytes(helper::kCodeSize);
      UNMOOR_TRY(ReadMemory(pid, data + Bytes(offsetof(helper::Data, watch_state)),
                            std::as_writable_bytes(std::span(&state, 1))));
      UNMOOR_TRY(ReadMemory(pid, data + Bytes(offsetof(helper::Data, watch_thread)),
                            std::as_writable_bytes(std::span(&watch, 1))));
      const auto info = ReadProcess(thread.thread());
      const bool is_watch = info && !info->ns_pids.empty() && info->ns_pids.back() == watch;
      if (state == helper::kWatchHealing || !is_watch) {
        return Failure(Error(ErrorKind::kMachine, EAGAIN, "a thread still executes our code"));
      }
      UNMOOR_TRY(thread.BeginRemote());
      (void)thread.RunRemote(instruction, SYS_exit, {0, 0, 0, 0, 0, 0});
      break;
    }
  }
  return {};
}

}  // namespace

Result<> RemoveHelperTraces(Pid pid, std::span<StoppedThread> stopped,
                            std::span<const Leftover> leftovers) {
  UNMOOR_ASSIGN(const std::vector<HelperChild> helpers, FindHelpers(pid));
  if (helpers.empty() && leftovers.empty()) return {};
  UNMOOR_TRY(EndWatch(pid, stopped, leftovers));
  UNMOOR_ASSIGN(Borrowed borrowed, Borrowed::From(pid, stopped));
  for (const HelperChild& helper : helpers) {
    if (!helper.ended) continue;
    (void)borrowed.Call(
        "wait4", SYS_wait4,
        {static_cast<uint64_t>(helper.pid_in_program), 0, __WALL | WNOHANG, 0, 0, 0});
  }
  for (const Leftover& leftover : leftovers) {
    for (const VaddrRange owned : leftover.owned) {
      UNMOOR_TRY(
          borrowed.Call("munmap", SYS_munmap, {owned.begin.value, owned.size().value, 0, 0, 0, 0}));
    }
    UNMOOR_TRY(borrowed.Call("munmap", SYS_munmap,
                             {leftover.region.value, helper::kRegionSize, 0, 0, 0, 0}));
  }
  return {};
}

Result<std::vector<Leftover>> FindLeftovers(Pid pid) {
  UNMOOR_ASSIGN(const std::vector<VmaInfo> vmas, ReadMaps(pid));
  return FindLeftovers(pid, vmas);
}

std::vector<Leftover> FindLeftovers(Pid pid, std::span<const VmaInfo> vmas) {
  std::vector<Leftover> leftovers;
  for (const VmaInfo& vma : vmas) {
    if (!vma.IsPrivateAnonymous() || vma.range.size().value != helper::kCodeSize ||
        vma.prot != (PROT_READ | PROT_EXEC)) {
      continue;
    }
    char magic[16] = {};
    if (!ReadMemory(pid, vma.range.begin, std::as_writable_bytes(std::span(magic))) ||
        std::memcmp(magic, helper::kMagic, sizeof(helper::kMagic)) != 0) {
      continue;
    }
    Leftover leftover{vma.range.begin, {}};
    const Vaddr data = vma.range.begin + Bytes(helper::kCodeSize);
    uint64_t count = 0;
    helper::OwnedRange owned[helper::kMaxOwned] = {};
    if (ReadMemory(pid, data + Bytes(offsetof(helper::Data, owned_count)),
                   std::as_writable_bytes(std::span(&count, 1))) &&
        ReadMemory(pid, data + Bytes(offsetof(helper::Data, owned)),
                   std::as_writable_bytes(std::span(owned)))) {
      for (uint64_t i = 0; i < std::min<uint64_t>(count, helper::kMaxOwned); ++i) {
        if (owned[i].length == 0) continue;
        leftover.owned.push_back({Vaddr(owned[i].begin), Vaddr(owned[i].begin + owned[i].length)});
      }
    }
    leftovers.push_back(std::move(leftover));
  }
  return leftovers;
}

Result<std::vector<HelperChild>> FindHelpers(Pid pid) {
  UNMOOR_ASSIGN(const std::vector<Pid> children, ReadChildren(pid));
  std::vector<HelperChild> helpers;
  for (const Pid child : children) {
    const auto info = ReadProcess(child);
    if (!info || info->name != "unmoor-helper" || info->ns_pids.empty()) continue;
    helpers.push_back({child, info->ns_pids.back(), info->state == 'Z'});
  }
  return helpers;
}

void NameMemory(Pid pid, std::span<const NamedMemory> memory) {
  constexpr Nanos kPatience(1'000'000'000);
  if (memory.empty() || !CanNameMemory()) return;
  ProgramStop stop(pid);
  const auto name_all = [&]() -> Result<> {
    UNMOOR_TRY(stop.Stop(kPatience, {}));
    UNMOOR_ASSIGN(Borrowed borrowed, Borrowed::From(pid, stop.threads()));
    UNMOOR_ASSIGN(const uint64_t text,
                  borrowed.Call("mmap", SYS_mmap,
                                {0, kPageSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                                 ~uint64_t{0}, 0}));
    for (const auto& [range, name] : memory) {
      const auto bytes = std::as_bytes(std::span(name.c_str(), name.size() + 1));
      if (bytes.size() > kPageSize || !WriteMemory(pid, Vaddr(text), bytes)) continue;
      (void)borrowed.Call(
          "prctl", SYS_prctl,
          {kPrSetVma, kPrSetVmaAnonName, range.begin.value, range.size().value, text, 0});
    }
    UNMOOR_TRY(borrowed.Call("munmap", SYS_munmap, {text, kPageSize, 0, 0, 0, 0}));
    return {};
  };
  if (const auto named = name_all(); !named) spdlog::debug("{}", named.error().message());
}

}  // namespace unmoor
