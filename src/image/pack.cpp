// See pack.h.
#include "image/pack.h"

#include <fcntl.h>

#include <algorithm>
#include <memory>

#include "base/fault_point.h"
#include "base/log.h"
#include "image/directory_lock.h"
#include "image/layout.h"
#include "image/packed_layer.h"
#include "image/publisher.h"
#include "os/file.h"
#include "os/process_control.h"

namespace unmoor {
namespace {

constexpr std::string_view kCacheInfix = ".unpacked-";
constexpr size_t kBootDigits = 8;

// Gives `to` all of `from`, as hard links where it can, but for the files that `leave_out` names.
Result<> LinkTree(const std::string& from, const std::string& to,
                  const std::function<bool(const std::string& path)>& leave_out, int depth = 0) {
  if (depth > 2) return UserError("{} is nested too deeply for an image directory", from);
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(from));
  for (const std::string& name : names) {
    const std::string path = from + "/" + name;
    if (leave_out(path)) continue;
    // Links and devices have no place in an image and are not followed.
    UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK));
    UNMOOR_ASSIGN(const struct stat info, StatFd(fd.get(), path));
    if (S_ISDIR(info.st_mode)) {
      UNMOOR_TRY(MakeDirectory(to + "/" + name, info.st_mode & 0777));
      UNMOOR_TRY(LinkTree(path, to + "/" + name, leave_out, depth + 1));
    } else if (S_ISREG(info.st_mode)) {
      UNMOOR_TRY(LinkOrCopyFile(fd.get(), to + "/" + name));
    } else {
      return UserError("{} is neither a file nor a directory; it has no place in an image", path);
    }
  }
  return {};
}

bool SameFile(const std::string& a, const std::string& b) {
  const auto one = Stat(a);
  const auto other = Stat(b);
  return one && other && one->st_ino == other->st_ino && one->st_dev == other->st_dev;
}

// The layers that are (not) packed. Of the directory's list, so that none counts for plain because
// it could not be looked at.
Result<std::vector<ManifestLayer>> LayersIn(const std::string& directory, const Manifest& manifest,
                                            bool packed) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(LayersDirectory(directory)));
  const auto has = [&](const ManifestLayer& layer, std::string_view suffix) {
    return std::ranges::binary_search(names, layer.id + std::string(suffix));
  };
  std::vector<ManifestLayer> layers;
  for (const ManifestLayer& layer : manifest.layers) {
    const bool is_packed = !has(layer, kPagesSuffix) && has(layer, kPackedSuffix);
    if (is_packed == packed) layers.push_back(layer);
  }
  return layers;
}

// What both directions have in common: where to, the links, the publication.
class Conversion {
 public:
  Conversion(const std::string& directory, const PackProgress& progress)
      : directory_(directory), progress_(progress) {}

  [[nodiscard]] Result<> Begin(const std::optional<std::string>& out) {
    UNMOOR_ASSIGN(manifest_, ReadManifest(directory_));
    UNMOOR_ASSIGN(source_, RealPath(directory_));
    const bool in_place = !out || SameFile(*out, source_);
    // In place the publisher holds the lock, exclusively.
    if (!in_place) {
      UNMOOR_ASSIGN(lock_, DirectoryLock::Take(source_, LockUse::kRead));
    }
    auto publisher = Publisher::Begin(in_place ? source_ : *out);
    if (!publisher) return Failure(std::move(publisher).error());
    publisher_ = std::make_unique<Publisher>(std::move(*publisher));
    // Another command may have replaced the directory before the lock was had.
    UNMOOR_ASSIGN(manifest_, ReadManifest(source_));
    return {};
  }

  // The layers that are (not) packed now.
  [[nodiscard]] Result<std::vector<ManifestLayer>> Layers(bool packed) const {
    return LayersIn(source_, manifest_, packed);
  }

  // Files of these layers in the form they have stay behind.
  [[nodiscard]] Result<> Link(const std::vector<ManifestLayer>& layers) const {
    return LinkTree(source_, publisher_->path(), [&](const std::string& path) {
      return std::ranges::any_of(layers, [&](const ManifestLayer& layer) {
        return path == LayerPagesPath(source_, layer.id) ||
               path == LayerPackedPath(source_, layer.id);
      });
    });
  }

  [[nodiscard]] PackWork Work() {
    if (!progress_) return {};
    return {0, [this, before = report_.pages](Bytes done) { progress_(before + done, total_); }};
  }

  [[nodiscard]] Result<> PackAll(const std::vector<ManifestLayer>& layers,
                                 const Compression& compression) {
    Prepare(layers);
    for (const ManifestLayer& layer : layers) {
      const auto size =
          PackLayer(LayerPagesPath(source_, layer.id), LayerIndexPath(source_, layer.id),
                    LayerPackedPath(publisher_->path(), layer.id), compression, Work());
      if (!size) return Failure(size.error());
      report_.pages += size->content;
      report_.packed += size->stored;
    }
    return {};
  }

  [[nodiscard]] Result<> UnpackAll(const std::vector<ManifestLayer>& layers, bool durable) {
    Prepare(layers);
    for (const ManifestLayer& layer : layers) {
      UNMOOR_ASSIGN(const PackedReader packed, PackedReader::Open(source_, layer));
      UNMOOR_TRY(
          UnpackLayer(packed, LayerPagesPath(publisher_->path(), layer.id), durable, Work()));
      report_.pages += packed.size().content;
      report_.packed += packed.size().stored;
    }
    return {};
  }

  [[nodiscard]] Result<PackReport> Publish(const char* fault_point, bool durable) {
    report_.working = MonotonicNow() - begin_;
    UNMOOR_TRY(FaultPoint(fault_point));
    UNMOOR_TRY(publisher_->Publish(durable));
    report_.directory = publisher_->target();
    report_.elapsed = MonotonicNow() - begin_;
    return report_;
  }

  [[nodiscard]] const std::string& source() const { return source_; }

 private:
  void Prepare(const std::vector<ManifestLayer>& layers) {
    report_.layers = layers.size();
    for (const ManifestLayer& layer : layers) total_ += layer.data;
  }

  const std::string& directory_;
  const PackProgress& progress_;
  const Nanos begin_ = MonotonicNow();
  Manifest manifest_;
  std::string source_;
  DirectoryLock lock_;
  std::unique_ptr<Publisher> publisher_;
  PackReport report_;
  Bytes total_;
};

// "/store/image" → "/store/.image.unpacked-", after which the boot is named.
std::string CachePrefix(const std::string& directory) {
  const size_t slash = directory.rfind('/');
  return directory.substr(0, slash + 1) + "." + directory.substr(slash + 1) +
         std::string(kCacheInfix);
}

Result<std::string> CachePath(const std::string& directory) {
  UNMOOR_ASSIGN(const std::string boot, ReadFile("/proc/sys/kernel/random/boot_id", Bytes(64)));
  return CachePrefix(directory) + boot.substr(0, kBootDigits);
}

// Whether the cache is of what `directory` holds now, and made by the same user: the directory
// beside it may be one in which others can write.
bool IsCacheOf(const std::string& cache, const std::string& directory, const Manifest& manifest) {
  const auto fd = OpenFile(cache, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
  if (!fd) return false;
  const auto info = StatFd(fd->get(), cache);
  if (!info || info->st_uid != OwnUid() || (info->st_mode & 022) != 0) return false;
  const auto ours = ReadFile(ManifestPath(directory));
  const auto theirs = ReadFile(ManifestPath(cache));
  return ours && theirs && *ours == *theirs && !IsPacked(cache, manifest);
}

bool HoldsPackedLayers(const std::string& directory) {
  const auto names = ListDirectory(LayersDirectory(directory));
  return !names || std::ranges::any_of(*names, [](const std::string& name) {
    return name.ends_with(kPackedSuffix);
  });
}

// Those of earlier boots. Ones in use by a command stay.
void RemoveOlderCaches(const std::string& directory, const std::string& current) {
  for (const std::string& cache : CachesOf(directory)) {
    if (cache == current) continue;
    const auto lock = DirectoryLock::Take(cache, LockUse::kWrite);
    if (!lock) continue;
    spdlog::info("removing {}, unpacked before the machine was started anew", cache);
    if (const auto removed = RemoveAsLeftover(cache); !removed) {
      spdlog::warn("{}", removed.error().message());
    }
  }
}

}  // namespace

bool IsPacked(const std::string& directory, const Manifest& manifest) {
  return std::ranges::any_of(manifest.layers, [&](const ManifestLayer& layer) {
    return IsPackedLayer(directory, layer.id);
  });
}

Result<PackReport> PackDirectory(const std::string& directory,
                                 const std::optional<std::string>& out,
                                 const Compression& compression, const PackProgress& progress) {
  Conversion conversion(directory, progress);
  UNMOOR_TRY(conversion.Begin(out));
  UNMOOR_ASSIGN(const std::vector<ManifestLayer> layers, conversion.Layers(false));
  if (layers.empty()) {
    return UserError("{} holds no layer that is not packed already; nothing was done", directory);
  }
  UNMOOR_TRY(conversion.Link(layers));
  UNMOOR_TRY(conversion.PackAll(layers, compression));
  return conversion.Publish("pack.before_publish", true);
}

Result<PackReport> UnpackDirectory(const std::string& directory,
                                   const std::optional<std::string>& out,
                                   const PackProgress& progress) {
  Conversion conversion(directory, progress);
  UNMOOR_TRY(conversion.Begin(out));
  UNMOOR_ASSIGN(const std::vector<ManifestLayer> layers, conversion.Layers(true));
  if (layers.empty()) return UserError("{} is not packed; nothing was done", directory);
  UNMOOR_TRY(conversion.Link(layers));
  UNMOOR_TRY(conversion.UnpackAll(layers, true));
  return conversion.Publish("unpack.before_publish", true);
}

Result<Bytes> PackLayerIn(const std::string& directory, const ManifestLayer& entry,
                          const Compression& compression, const PackProgress& progress) {
  const std::string pages = LayerPagesPath(directory, entry.id);
  const std::string packed = LayerPackedPath(directory, entry.id);
  PackWork work;
  if (progress) work.progress = [&](Bytes done) { progress(done, entry.data); };
  const auto size =
      PackLayer(pages, LayerIndexPath(directory, entry.id), packed, compression, work);
  // Before the pages go it is on disk: they may be all there is of a program.
  auto synced = size ? SyncPath(packed) : Result<>();
  if (!size || !synced) {
    (void)RemoveFile(packed);
    return Failure(size ? synced.error() : size.error());
  }
  UNMOOR_TRY(RemoveFile(pages));
  return size->stored;
}

Result<std::optional<UnpackedCache>> UnpackForRestore(const std::string& directory,
                                                      const PackProgress& progress) {
  // The manifest takes longer to read than all that a restore does before it starts criu.
  if (!HoldsPackedLayers(directory)) return std::optional<UnpackedCache>();
  UNMOOR_ASSIGN(const Manifest manifest, ReadManifest(directory));
  UNMOOR_ASSIGN(const std::string source, RealPath(directory));
  UNMOOR_ASSIGN(const auto packed, LayersIn(source, manifest, true));
  if (packed.empty()) return std::optional<UnpackedCache>();
  UnpackedCache cache;
  UNMOOR_ASSIGN(cache.directory, CachePath(source));
  RemoveOlderCaches(source, cache.directory);
  const Nanos begin = MonotonicNow();
  if (IsCacheOf(cache.directory, source, manifest)) {
    cache.reused = true;
    return cache;
  }
  Conversion conversion(source, progress);
  if (auto begun = conversion.Begin(cache.directory); !begun) {
    return Failure(begun.error().WithContext(
        fmt::format("{} is packed and cannot be unpacked beside itself ('unmoor unpack DIR OUT' "
                    "unpacks elsewhere)",
                    directory)));
  }
  UNMOOR_ASSIGN(const std::vector<ManifestLayer> layers, conversion.Layers(true));
  UNMOOR_TRY(conversion.Link(layers));
  UNMOOR_TRY(conversion.UnpackAll(layers, false));
  UNMOOR_ASSIGN(const PackReport report, conversion.Publish("cache.before_publish", false));
  cache.pages = report.pages;
  cache.elapsed = MonotonicNow() - begin;
  return cache;
}

Result<std::optional<std::string>> FindUnpacked(const std::string& directory) {
  if (!HoldsPackedLayers(directory)) return std::optional<std::string>();
  UNMOOR_ASSIGN(const Manifest manifest, ReadManifest(directory));
  UNMOOR_ASSIGN(const std::string source, RealPath(directory));
  UNMOOR_ASSIGN(std::string cache, CachePath(source));
  if (!IsCacheOf(cache, source, manifest)) return std::optional<std::string>();
  return std::optional(std::move(cache));
}

bool IsCacheName(std::string_view name) {
  const size_t at = name.rfind(kCacheInfix);
  return name.starts_with('.') && at != std::string_view::npos && at > 1 &&
         name.size() == at + kCacheInfix.size() + kBootDigits;
}

std::vector<std::string> CachesOf(const std::string& directory) {
  const std::string prefix = CachePrefix(directory);
  const size_t slash = prefix.rfind('/');
  const std::string parent = prefix.substr(0, slash + 1);
  std::vector<std::string> caches;
  for (const std::string& name : ListDirectory(parent).value_or(std::vector<std::string>{})) {
    if (name.starts_with(prefix.substr(slash + 1)) && IsCacheName(name)) {
      caches.push_back(parent + name);
    }
  }
  return caches;
}

}  // namespace unmoor
