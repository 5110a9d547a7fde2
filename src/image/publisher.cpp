// See publisher.h.
#include "image/publisher.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/fault_point.h"
#include "base/log.h"
#include "image/layout.h"
#include "os/file.h"
#include "os/file_lock.h"

namespace unmoor {
namespace {

constexpr std::string_view kPartialInfix = ".partial-";
constexpr size_t kSuffixLength = 6;  // of mkdtemp

struct Place {
  std::string parent;
  std::string name;
  bool exists = false;

  [[nodiscard]] std::string target() const { return (parent == "/" ? "" : parent) + "/" + name; }
  [[nodiscard]] std::string partial_prefix() const { return name + std::string(kPartialInfix); }
};

// Absolute parent and last component. A DIR that is a symbolic link stands for what it points at.
Result<Place> Locate(std::string dir) {
  while (dir.size() > 1 && dir.back() == '/') dir.pop_back();
  if (dir.empty()) return UserError("the image directory has no name");
  Place place;
  place.exists = Stat(dir).has_value();
  if (place.exists) {
    UNMOOR_ASSIGN(dir, RealPath(dir));
  } else if (Exists(dir)) {
    return UserError("{} is a symbolic link that leads nowhere", dir);
  }
  const size_t slash = dir.rfind('/');
  place.name = dir.substr(slash == std::string::npos ? 0 : slash + 1);
  const std::string parent = slash == std::string::npos ? "." : dir.substr(0, slash + 1);
  if (place.name.empty() || place.name == "." || place.name == "..") {
    return UserError("{} cannot be an image directory; give one below it", dir);
  }
  const auto real = RealPath(parent);
  if (!real && (real.error().errnum() == ENOENT || real.error().errnum() == ENOTDIR)) {
    return UserError("{} cannot be made: the directory {} does not exist", dir, parent);
  }
  if (!real) return Failure(real.error());
  place.parent = *real;
  return place;
}

// Whether `target`, which exists, may be replaced.
Result<> CheckReplaceable(const Place& place) {
  const std::string target = place.target();
  UNMOOR_ASSIGN(const struct stat info, Stat(target));
  if (!S_ISDIR(info.st_mode)) return UserError("{} exists and is not a directory", target);
  UNMOOR_ASSIGN(const struct stat parent, Stat(place.parent));
  if (parent.st_dev != info.st_dev) {
    return UserError("{} is a mount point and cannot be replaced; give a directory below it",
                     target);
  }
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(target));
  if (names.empty()) return {};
  UNMOOR_ASSIGN(const bool ours, IsCheckpointDirectory(target));
  if (ours) return {};
  return UserError(
      "{} is not empty and holds more than an unmoor checkpoint; give an empty or a new directory",
      target);
}

// flock of `path` (a directory); an empty Fd when somebody else has it.
Result<Fd> LockDirectory(const std::string& path) {
  UNMOOR_ASSIGN(Fd fd, OpenFile(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW));
  UNMOOR_ASSIGN(const bool locked, TryLock(fd.get(), path));
  if (!locked) fd.Reset();
  return fd;
}

// The parent is locked only while a partial directory is looked for or made.
Result<Fd> LockParent(const std::string& parent) {
  constexpr int kTries = 1000;
  for (int i = 0; i < kTries; ++i) {
    UNMOOR_ASSIGN(Fd fd, LockDirectory(parent));
    if (fd.valid()) return fd;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return MachineError("{} has been locked by another process for 10 s", parent);
}

// Removes what killed commands left; an error when one is at work. REQUIRES the parent's lock.
Result<> RemoveLeftovers(const Place& place) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(place.parent));
  for (const std::string& name : names) {
    if (!IsPartialName(name) || !name.starts_with(place.partial_prefix())) continue;
    const std::string path = place.parent + "/" + name;
    auto lock = LockDirectory(path);
    if (!lock && (lock.error().errnum() == ENOENT || lock.error().errnum() == ENOTDIR)) continue;
    if (!lock) return Failure(std::move(lock).error());
    if (!lock->valid()) {
      return UserError("another command is writing a checkpoint to {} (in {})", place.target(),
                       path);
    }
    spdlog::info("removing {}, left by a command that did not finish", path);
    UNMOOR_TRY(RemoveTree(path));
  }
  return {};
}

// fsync of every file and directory of the tree.
Result<> SyncTree(const std::string& directory) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(directory));
  for (const std::string& name : names) {
    const std::string path = directory + "/" + name;
    const auto fd = OpenFile(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
    // A link or a socket has nothing of its own to sync: its directory holds it.
    if (!fd && (fd.error().errnum() == ELOOP || fd.error().errnum() == ENXIO)) continue;
    if (!fd) return Failure(fd.error());
    UNMOOR_ASSIGN(const struct stat info, StatFd(fd->get(), path));
    if (S_ISDIR(info.st_mode)) {
      UNMOOR_TRY(SyncTree(path));
    } else if (S_ISREG(info.st_mode)) {
      UNMOOR_TRY(SyncFd(fd->get(), path));
    }
  }
  return SyncPath(directory);
}

}  // namespace

Result<> RemoveAsLeftover(const std::string& path) {
  UNMOOR_ASSIGN(const std::string id, NewId());
  const std::string gone = path + std::string(kPartialInfix) + id.substr(0, kSuffixLength);
  UNMOOR_TRY(Rename(path, gone));
  UNMOOR_TRY(FaultPoint("rm.after_rename"));
  return RemoveTree(gone);
}

bool IsPartialName(std::string_view name) {
  const size_t at = name.rfind(kPartialInfix);
  return at != std::string_view::npos && at > 0 &&
         name.size() == at + kPartialInfix.size() + kSuffixLength &&
         name.find('.', at + 1) == std::string_view::npos;
}

Result<bool> IsCheckpointDirectory(const std::string& dir) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(dir));
  if (!std::ranges::binary_search(names, "manifest.json")) return false;
  if (!std::ranges::all_of(names, IsImagePart)) return false;
  const auto text = ReadFile(ManifestPath(dir));
  if (!text && text.error().errnum() != 0) return Failure(text.error());
  return text && text->find("\"unmoor checkpoint\"") != std::string::npos;
}

Result<Publisher> Publisher::Begin(const std::string& dir) {
  UNMOOR_ASSIGN(const Place place, Locate(dir));
  if (place.exists) UNMOOR_TRY(CheckReplaceable(place));
  UNMOOR_ASSIGN(const Fd parent_lock, LockParent(place.parent));
  UNMOOR_TRY(RemoveLeftovers(place));
  Publisher publisher;
  if (place.exists) {
    UNMOOR_ASSIGN(publisher.target_lock_, DirectoryLock::Take(place.target(), LockUse::kWrite));
  }
  publisher.parent_ = place.parent;
  publisher.target_ = place.target();
  UNMOOR_ASSIGN(publisher.partial_, MakeTemporaryDirectory(place.parent, place.partial_prefix()));
  UNMOOR_ASSIGN(publisher.lock_, LockDirectory(publisher.partial_));
  if (!publisher.lock_.valid()) return MachineError("cannot lock {}", publisher.partial_);
  return publisher;
}

Publisher::Publisher(Publisher&& other) noexcept
    : parent_(std::move(other.parent_)),
      target_(std::move(other.target_)),
      partial_(std::exchange(other.partial_, {})),
      lock_(std::move(other.lock_)),
      target_lock_(std::move(other.target_lock_)) {}

// After Publish() the partial name is gone, or that of the older checkpoint whose removal failed.
Publisher::~Publisher() {
  if (partial_.empty()) return;
  if (const auto removed = RemoveTree(partial_); !removed) {
    spdlog::warn("{}", removed.error().message());
  }
}

Result<> Publisher::MoveIntoPlace() {
  if (!Exists(target_)) return Rename(partial_, target_);
  // DIR may have changed since Begin, and what it holds is about to be removed.
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(target_));
  if (names.empty()) return Rename(partial_, target_);
  UNMOOR_ASSIGN(const bool ours, IsCheckpointDirectory(target_));
  if (!ours) {
    return UserError("{} was filled by somebody else meanwhile; nothing was published", target_);
  }
  // Held until it is removed, too, so that nobody takes the older one for left over.
  if (!target_lock_.held()) {
    UNMOOR_ASSIGN(target_lock_, DirectoryLock::Take(target_, LockUse::kWrite));
  }
  auto exchanged = RenameExchange(partial_, target_);
  if (exchanged || exchanged.error().errnum() != EINVAL) return exchanged;
  return UserError("the file system of {} cannot exchange directories; give a new directory",
                   target_);
}

Result<> Publisher::Publish(bool sync) {
  UNMOOR_CHECK(!partial_.empty());
  UNMOOR_TRY(FaultPoint("publish.before_sync"));
  if (sync) UNMOOR_TRY(SyncTree(partial_));
  UNMOOR_TRY(FaultPoint("publish.before_rename"));
  UNMOOR_TRY(MoveIntoPlace());
  if (sync) UNMOOR_TRY(SyncPath(parent_));
  UNMOOR_TRY(FaultPoint("publish.after_rename"));
  lock_.Reset();  // of what is DIR now: it can be read
  UNMOOR_TRY(RemoveTree(partial_));
  partial_.clear();
  target_lock_.Release();
  return {};
}

}  // namespace unmoor
