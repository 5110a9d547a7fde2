// See catalog.h.
#include "store/catalog.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
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
#include "store/pending_file.h"

namespace unmoor {
namespace {

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
    if (!IsPartialName(name) && !IsCacheName(name) && IsImage(directory))
      images.push_back(directory);
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
Result<bool> HoldsOnlyImageParts(const std::string& path) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(path));
  return std::ranges::all_of(names, IsImagePart);
}

// Locked by a command at work. REQUIRES the store's lock, under which commands make and lock such
// directories.
Result<bool> IsInUse(const std::string& path) {
  UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW));
  UNMOOR_ASSIGN(const bool locked, TryLock(fd.get(), path));
  return !locked;
}

// Somebody else's, in use, or gone meanwhile: not garbage, and no failure of the machine.
bool IsNotOurs(const Error& error) {
  const int errnum = error.errnum();
  return errnum == 0 || errnum == ENOENT || errnum == ENOTDIR || errnum == ELOOP ||
         errnum == EACCES || errnum == EPERM;
}

// Files in DIR/layers that its manifest does not name.
Result<std::vector<Garbage>> FindUnnamedLayers(const std::string& directory,
                                               const Manifest& manifest) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(LayersDirectory(directory)));
  std::vector<Garbage> items;
  std::set<std::string> known;
  for (const ManifestLayer& layer : manifest.layers) {
    known.insert(layer.id + std::string(kPagesSuffix));
    known.insert(layer.id + std::string(kIndexSuffix));
    // Where both forms are, the packed one is not read.
    if (IsPackedLayer(directory, layer.id)) known.insert(layer.id + std::string(kPackedSuffix));
  }
  for (const std::string& name : names) {
    const bool pending = IsPendingName(name, kRepairInfix) || IsPendingName(name, kReorderInfix);
    const size_t dot = name.find('.');
    if (known.contains(name) || dot == std::string::npos || !IsValidId(name.substr(0, dot)))
      continue;
    const std::string suffix = name.substr(dot);
    if (!pending && suffix != kPagesSuffix && suffix != kIndexSuffix && suffix != kPackedSuffix)
      continue;
    items.push_back({LayersDirectory(directory) + "/" + name,
                     pending ? "left by a command that did not finish"
                             : "a layer file that the manifest does not name"});
  }
  return items;
}

// What of a store's entry is garbage, and the lock under which it is removed.
struct EntryGarbage {
  std::vector<Garbage> items;
  DirectoryLock lock;
  bool whole = false;  // the entry itself, which may be an image
  std::optional<Kept> kept;
};

Result<EntryGarbage> FindGarbage(const std::string& store, const std::string& name) {
  const std::string entry = store + "/" + name;
  EntryGarbage garbage;
  if (IsPartialName(name)) {
    UNMOOR_ASSIGN(const bool ours, HoldsOnlyImageParts(entry));
    if (!ours) return garbage;
    UNMOOR_ASSIGN(const bool used, IsInUse(entry));
    if (used) {
      garbage.kept = Kept{entry, "in use by a command", {}};
    } else {
      garbage.items = {{entry, "left by a command that did not finish"}};
    }
    return garbage;
  }
  if (!IsImage(entry)) return garbage;
  if (IsCacheName(name)) {
    UNMOOR_ASSIGN(garbage.whole, IsCheckpointDirectory(entry));
    if (!garbage.whole) return garbage;
  }
  UNMOOR_ASSIGN(garbage.lock, DirectoryLock::Take(entry, LockUse::kWrite));
  if (garbage.whole) {
    garbage.items = {{entry, "unpacked for a restore"}};
  } else {
    UNMOOR_ASSIGN(const Manifest manifest, ReadManifest(entry));
    UNMOOR_ASSIGN(garbage.items, FindUnnamedLayers(entry, manifest));
    garbage.kept = Kept{entry, "an image", {}};
    for (const ManifestLayer& layer : manifest.layers) garbage.kept->layers.push_back(layer.id);
  }
  return garbage;
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
  UNMOOR_ASSIGN(const bool is_image, IsCheckpointDirectory(path));
  if (!is_image) {
    return UserError(
        "{} is not an image directory, or holds more than an image; nothing was "
        "removed",
        directory);
  }
  LinkCounter links;
  links.Add(path);
  UNMOOR_TRY(RemoveAsLeftover(path));
  // What restores unpacked of it goes too, unless a command is just using it: gc will.
  for (const std::string& cache : CachesOf(path)) {
    const auto cache_lock = DirectoryLock::Take(cache, LockUse::kWrite);
    if (!cache_lock) continue;
    links.Add(cache);
    UNMOOR_TRY(RemoveAsLeftover(cache));
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
  for (const std::string& name : names) {
    const auto found = FindGarbage(path, name);
    if (!found && !IsNotOurs(found.error())) return Failure(found.error());
    if (!found) {
      report.kept.push_back({path + "/" + name, found.error().message(), {}});
      continue;
    }
    if (found->kept) report.kept.push_back(*found->kept);
    for (const Garbage& item : found->items) {
      links.Add(item.path);
      UNMOOR_TRY(FaultPoint("gc.before_remove"));
      if (!dry_run) {
        UNMOOR_TRY(found->whole ? RemoveAsLeftover(item.path) : RemoveTree(item.path));
      }
      report.items.push_back(item);
    }
  }
  report.bytes = links.Freed();
  return report;
}

}  // namespace unmoor
