// See metadata.h.
#include "criu/metadata.h"

#include <sys/mman.h>

#include <algorithm>
#include <set>

#include "criu/image_codec.h"
#include "criu/mm_image.h"
#include "proto/image.pb.h"

namespace unmoor::criu {
namespace {

// Bit numbers of `madv` are the advice numbers of madvise(2).
constexpr uint64_t kWipeOnForkBit = uint64_t{1} << 18;

// Not in every libc's headers.
constexpr uint32_t kMapDroppable = 0x08;
constexpr uint32_t kMapTypeMask = 0x0f;

TaskState StateFromImage(uint32_t state) {
  switch (state) {
    case 1:
      return TaskState::kAlive;
    case 2:
      return TaskState::kDead;
    case 3:
      return TaskState::kStopped;
    case 6:
      return TaskState::kZombie;
    default:
      return TaskState::kOther;
  }
}

Result<> ReadCore(const std::string& directory, Task& task) {
  const std::string path = fmt::format("{}/core-{}.img", directory, task.vpid);
  UNMOOR_ASSIGN(const RawImage image, RawImage::Read(path, ImageType::kCore));
  if (image.messages().empty()) return UserError("{} holds no message; it is truncated", path);
  UNMOOR_ASSIGN(const proto::CoreEntry core,
                ParseMessage<proto::CoreEntry>(image, image.messages()[0]));
  if (!core.has_tc()) return UserError("{} says nothing of its task's state; it is damaged", path);
  task.name = core.tc().comm();
  task.state = StateFromImage(core.tc().task_state());
  return {};
}

}  // namespace

Result<std::vector<Task>> ReadTasks(const std::string& criu_directory) {
  const std::string path = criu_directory + "/pstree.img";
  UNMOOR_ASSIGN(const RawImage image, RawImage::Read(path, ImageType::kPstree));
  std::vector<Task> tasks;
  std::set<uint32_t> known;
  for (const RawImage::Message& raw : image.messages()) {
    UNMOOR_ASSIGN(const proto::PstreeEntry entry, ParseMessage<proto::PstreeEntry>(image, raw));
    // Session leaders and the like that ended long ago keep an entry without threads.
    Task task;
    task.vpid = entry.pid();
    task.parent = entry.ppid();
    task.process_group = entry.pgid();
    task.session = entry.sid();
    task.threads.assign(entry.threads().begin(), entry.threads().end());
    if (!known.insert(task.vpid).second) {
      return UserError("{}: task {} at offset {} is there twice; the file is damaged", path,
                       task.vpid, raw.offset.value);
    }
    if (task.parent != 0 && !known.contains(task.parent)) {
      return UserError("{}: task {} at offset {} has an unknown parent {}; the file is damaged",
                       path, task.vpid, raw.offset.value, task.parent);
    }
    UNMOOR_TRY(ReadCore(criu_directory, task));
    tasks.push_back(std::move(task));
  }
  if (tasks.empty()) return UserError("{} holds no task; it is truncated", path);
  return tasks;
}

Vma FromEntry(const proto::VmaEntry& entry) {
  Vma vma;
  vma.range = {Vaddr(entry.start()), Vaddr(entry.end())};
  vma.pgoff = entry.pgoff();
  vma.shmid = entry.shmid();
  vma.prot = entry.prot();
  vma.flags = entry.flags();
  vma.status = entry.status();
  vma.madv = entry.madv();
  return vma;
}

Result<MmImage> MmImage::Read(const std::string& criu_directory, uint32_t vpid) {
  MmImage mm;
  mm.path = fmt::format("{}/mm-{}.img", criu_directory, vpid);
  UNMOOR_ASSIGN(const RawImage image, RawImage::Read(mm.path, ImageType::kMm));
  if (image.messages().size() != 1) {
    return UserError("{} holds {} messages, 1 expected; it is damaged", mm.path,
                     image.messages().size());
  }
  UNMOOR_ASSIGN(mm.entry, ParseMessage<proto::MmEntry>(image, image.messages()[0]));
  for (const proto::VmaEntry& vma : mm.entry.vmas()) {
    if (vma.end() <= vma.start() || (vma.start() | vma.end()) % kPageSize != 0) {
      return UserError("{}: VMA {:x}-{:x} is no range of pages; the file is damaged", mm.path,
                       vma.start(), vma.end());
    }
  }
  return mm;
}

Result<std::vector<Vma>> ReadVmas(const std::string& criu_directory, uint32_t vpid) {
  UNMOOR_ASSIGN(const MmImage mm, MmImage::Read(criu_directory, vpid));
  std::vector<Vma> vmas;
  vmas.reserve(static_cast<size_t>(mm.entry.vmas_size()));
  for (const proto::VmaEntry& entry : mm.entry.vmas()) vmas.push_back(FromEntry(entry));
  return vmas;
}

std::string_view WhyNotTakeable(const Vma& vma) {
  constexpr uint32_t kSpecial = kVmaVsyscall | kVmaVdso | kVmaVvar | kVmaAioRing | kVmaShadowStack |
                                kVmaGuard | kVmaUprobes | kVmaPlugin | kVmaSocket | kVmaSysvIpc |
                                kVmaMemfd;
  constexpr uint32_t kShared = kVmaFileShared | kVmaAnonShared;
  if ((vma.status & kSpecial) != 0) return "it is a special mapping";
  if ((vma.status & kShared) != 0) return "it is shared";
  if ((vma.status & kVmaFilePrivate) != 0) return "it maps a file already";
  if ((vma.status & kVmaRegular) == 0 || (vma.status & kVmaAnonPrivate) == 0) {
    return "it is not private anonymous memory";
  }
  if ((vma.status & kVmaStack) != 0 || (vma.flags & MAP_GROWSDOWN) != 0) {
    return "it is a stack that grows down";
  }
  if ((vma.flags & MAP_HUGETLB) != 0) return "it is of hugetlb pages";
  if ((vma.flags & MAP_LOCKED) != 0) return "it is locked in memory";
  if ((vma.flags & kMapTypeMask) == kMapDroppable) return "it is droppable";
  if ((vma.flags & MAP_ANONYMOUS) == 0 || (vma.flags & kMapTypeMask) != MAP_PRIVATE) {
    return "it is not private anonymous memory";
  }
  if ((vma.madv & kWipeOnForkBit) != 0) return "it is wiped on fork";
  return {};
}

}  // namespace unmoor::criu
