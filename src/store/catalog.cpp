// See catalog.h.
#include "store/catalog.h"

#include <fcntl.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "base/fault_point.h"
#include "image/directory_lock.h"
#include "image/layout.h"
#include "image/pack.h"
#include "image/publisher.h"
#include "os/file.h"
#include "os/file_lock.h"

namespace unmoor {
namespace {

constexpr std::string_view kPartialInfix = ".partial-";
constexpr size_t kSuffixLength = 6;

// Counts what removing files would free: a file's blocks once its last name is gone.
class LinkCounter {
 public:
  void Add(const std::string& path) {
    const auto info = StatSelf(path);
    if (!info) return;
    if (S_ISDIR(info->st_mode)) {
      for (const std::string& name : ListDirectory(path).value_or(std::vector<std::string>{})) {
        Add(path + "/" + name);
      }
    }
    File& file = files_[{info->st_dev, info->st_ino}];
    ++file.names;
    file.links = S_ISDIR(info->st_mode) ? 1 : info->st_nlink;
    file.bytes = Bytes(static_cast<uint64_t>(info->st_blocks) * 512);
  }
  [[nodiscard]] Bytes Freed() const {
    Bytes sum;
    for (const auto& [key, file] : files_) {
      if (file.names >= file.links) sum += file.bytes;
    }
    return sum;
  }

 private:
  struct File {
    uint64_t names = 0;
    uint64_t links = 0;
    Bytes bytes;
  };
  // Of the path itself: a symbolic link is not followed.
  static Result<struct stat> StatSelf(const std::string& path) {
    UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_PATH | O_NOFOLLOW));
    return StatFd(fd.get(), path);
  }
  std::map<std::pair<dev_t, ino_t>, File> files_;
};

bool IsLeftoverName(std::string_view name) {
  const size_t at = name.rfind(kPartialInfix);
  return at != std::string_view::npos && at > 0 &&
         name.size() == at + kPartialInfix.size() + kSuffixLength &&
         name.find('.', at + 1) == std::string_view::npos;
}

bool IsImage(const std::string& directory) {
  return Exists(ManifestPath(directory));
}

Result<std::vector<std::string>> ImagesIn(const std::string& place) {
  const auto info = Stat(place);
  if (!info && info.error().errnum() == ENOENT) return UserError("{} does not exist", place);
  if (!info) return Failure(info.error());
  if (!S_ISDIR(info->st_mode)) return UserError("{} is not a directory", place);
  UNMOOR_ASSIGN(const std::string path, RealPath(place));
  if (IsImage(path)) return std::vector<std::string>{path};
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(path));
  std::vector<std::string> images;
  for (const std::string& name : names) {
    const std::string directory = path + "/" + name;
    // What was unpacked for a restore is no generation of its own.
    if (!IsLeftoverName(name) && !IsCacheName(name) && IsImage(directory)) images.push_back(directory);
  }
  return images;
}

// As the manifest says; else layers that `parent`, when given, does not have.
Bytes WrittenIn(const Manifest& manifest, const Manifest* parent) {
  std::set<std::string> known;
  if (parent != nullptr) {
    for (const ManifestLayer& layer : parent->layers) known.insert(layer.id);
  }
  Bytes sum = manifest.Totals().criu_data;
  if (manifest.written) return sum + *manifest.written;
  for (const ManifestLayer& layer : manifest.layers) {
    if (!known.contains(layer.id)) sum += layer.data;
  }
  return sum;
}

Generation ReadGeneration(const std::string& directory) {
  Generation generation;
  generation.directory = directory;
  LinkCounter links;
  links.Add(directory);
  generation.freeable = links.Freed();
  auto manifest = ReadManifest(directory);
  if (!manifest) {
    generation.problem = manifest.error().message();
    return generation;
  }
  generation.manifest = std::move(*manifest);
  generation.packed = IsPacked(directory, generation.manifest);
  for (const ManifestTask& task : generation.manifest.tasks) {
    for (const ManifestVma& vma : task.vmas) generation.pages += vma.data;
  }
  return generation;
}

// Made by a command of ours, as far as it got: a folder of somebody else's may have such a name.
bool HoldsOnlyImageParts(const std::string& path) {
  const auto names = ListDirectory(path);
  return names && std::ranges::all_of(*names, IsImagePart);
}

// Locked by a command at work, or gone meanwhile: not garbage. REQUIRES the store's lock, under
// which commands make and lock such directories.
bool IsInUse(const std::string& path) {
  const auto fd = OpenFile(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
  if (!fd) return true;
  const auto locked = TryLock(fd->get(), path);
  return !locked || !*locked;
}

// Files in DIR/layers that its manifest does not name.
void FindUnnamedLayers(const std::string& directory, std::vector<Garbage>& items) {
  const auto manifest = ReadManifest(directory);
  const auto names = ListDirectory(LayersDirectory(directory));
  if (!manifest || !names) return;
  std::set<std::string> known;
  for (const ManifestLayer& layer : manifest->layers) {
    known.insert(layer.id + std::string(kPagesSuffix));
    known.insert(layer.id + std::string(kIndexSuffix));
    // Where both forms are, the packed one is not read.
    if (IsPackedLayer(directory, layer.id)) known.insert(layer.id + std::string(kPackedSuffix));
  }
  for (const std::string& name : *names) {
    const bool repair = name.find(".repair-") != std::string::npos;
    const size_t dot = name.find('.');
    if (known.contains(name) || dot == std::string::npos || !IsValidId(name.substr(0, dot))) continue;
    const std::string suffix = name.substr(dot);
    if (!repair && suffix != kPagesSuffix && suffix != kIndexSuffix && suffix != kPackedSuffix) continue;
    items.push_back({LayersDirectory(directory) + "/" + name,
                     repair ? "left by a repair that did not finish"
                            : "a layer file that the manifest does not name"});
  }
}

// By one rename to the name of a leftover; killed behind it, gc finishes the work.
Result<> MoveAwayAndRemove(const std::string& path) {
  UNMOOR_ASSIGN(const std::string id, NewId());
  const std::string gone = path + std::string(kPartialInfix) + id.substr(0, kSuffixLength);
  UNMOOR_TRY(Rename(path, gone));
  UNMOOR_TRY(FaultPoint("rm.after_rename"));
  return RemoveTree(gone);
}

}  // namespace

Result<std::vector<Generation>> ListGenerations(const std::vector<std::string>& places) {
  std::vector<std::string> directories;
  for (const std::string& place : places) {
    UNMOOR_ASSIGN(const std::vector<std::string> found, ImagesIn(place));
    directories.insert(directories.end(), found.begin(), found.end());
  }
  std::ranges::sort(directories);
  const auto twice = std::ranges::unique(directories);
  directories.erase(twice.begin(), twice.end());
  std::vector<Generation> generations;
  for (const std::string& directory : directories) generations.push_back(ReadGeneration(directory));
  std::ranges::stable_sort(generations, {}, [](const Generation& g) { return g.manifest.created; });
  for (Generation& generation : generations) {
    const Generation* parent = nullptr;
    for (const Generation& other : generations) {
      if (generation.manifest.parent_id && !other.problem &&
          other.manifest.checkpoint_id == *generation.manifest.parent_id) {
        parent = &other;
      }
    }
    if (parent != nullptr) generation.parent_directory = parent->directory;
    generation.written =
        WrittenIn(generation.manifest, parent == nullptr ? nullptr : &parent->manifest);
  }
  return generations;
}

Result<Bytes> RemoveImage(const std::string& directory) {
  UNMOOR_ASSIGN(const DirectoryLock lock, DirectoryLock::Take(directory, LockUse::kWrite));
  if (!lock.held()) return UserError("{} does not exist, or is no directory", directory);
  UNMOOR_ASSIGN(const std::string path, RealPath(directory));
  if (!IsCheckpointDirectory(path)) {
    return UserError("{} is not an image directory, or holds more than an image; nothing was "
                     "removed",
                     directory);
  }
  LinkCounter links;
  links.Add(path);
  UNMOOR_TRY(MoveAwayAndRemove(path));
  // What restores unpacked of it goes too, unless a command is just using it: gc will.
  for (const std::string& cache : CachesOf(path)) {
    const auto cache_lock = DirectoryLock::Take(cache, LockUse::kWrite);
    if (!cache_lock) continue;
    links.Add(cache);
    UNMOOR_TRY(MoveAwayAndRemove(cache));
  }
  UNMOOR_TRY(SyncPath(path.substr(0, std::max<size_t>(1, path.rfind('/')))));
  return links.Freed();
}

Result<GarbageReport> CollectGarbage(const std::string& store, bool dry_run) {
  UNMOOR_ASSIGN(const std::string path, RealPath(store));
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(path));
  if (IsImage(path)) {
    return UserError("{} is an image directory; give the directory that holds it", store);
  }
  UNMOOR_ASSIGN(const DirectoryLock store_lock, DirectoryLock::Take(path, LockUse::kWrite));
  GarbageReport report;
  LinkCounter links;
  const auto collect = [&](const std::vector<Garbage>& items) -> Result<> {
    for (const Garbage& item : items) {
      links.Add(item.path);
      UNMOOR_TRY(FaultPoint("gc.before_remove"));
      if (!dry_run) UNMOOR_TRY(RemoveTree(item.path));
      report.items.push_back(item);
    }
    return {};
  };
  for (const std::string& name : names) {
    const std::string entry = path + "/" + name;
    if (IsLeftoverName(name)) {
      if (!HoldsOnlyImageParts(entry) || IsInUse(entry)) continue;
      UNMOOR_TRY(collect({{entry, "left by a command that did not finish"}}));
    } else if (IsCacheName(name) && IsCheckpointDirectory(entry)) {
      const auto lock = DirectoryLock::Take(entry, LockUse::kWrite);
      if (!lock) continue;
      UNMOOR_TRY(collect({{entry, "unpacked for a restore"}}));
    } else if (IsImage(entry)) {
      const auto lock = DirectoryLock::Take(entry, LockUse::kWrite);
      if (!lock) continue;  // somebody reads or replaces it now
      std::vector<Garbage> items;
      FindUnnamedLayers(entry, items);
      UNMOOR_TRY(collect(items));
    }
  }
  report.bytes = links.Freed();
  return report;
}

}  // namespace unmoor
