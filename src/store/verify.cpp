// See verify.h.
#include "store/verify.h"

#include <algorithm>
#include <map>
#include <memory>
#include <set>

#include "criu/metadata.h"
#include "criu/page_images.h"
#include "image/directory_lock.h"
#include "image/layout.h"
#include "image/overlay.h"
#include "image/pack.h"
#include "image/packed_layer.h"
#include "image/working_set.h"
#include "os/file.h"
#include "os/process_control.h"
#include "store/repair.h"

namespace unmoor {
namespace {

Damage Whole(std::string file, const Error& error) {
  return {std::move(file), std::nullopt, error.message(), {}};
}

class Verifier {
 public:
  explicit Verifier(const VerifyDirectoryOptions& options) : options_(options) {}
  [[nodiscard]] Result<VerifyDirectoryReport> Run();

 private:
  [[nodiscard]] Result<> CheckRepairSource() const;
  void CheckLayers();
  void CheckLayer(uint32_t number, const std::string& id, const ManifestLayer* entry);
  void CheckAgreement();
  void CheckUserData();
  void CheckWorkingSetFile();
  void CheckCriu();
  void CheckPagemap(criu::PageStreamId id);
  [[nodiscard]] std::vector<std::string> FindLayers() const;
  // Whether something was mended; `verdict` is the one after that.
  [[nodiscard]] bool Repair(uint32_t number, const ManifestLayer& entry, LayerVerdict& verdict);

  const VerifyDirectoryOptions& options_;
  VerifyDirectoryReport report_;
  std::optional<Manifest> manifest_;
  std::vector<std::optional<LayerIndex>> indexes_;  // of the manifest's layers
  Bytes total_;
};

Result<> Verifier::CheckRepairSource() const {
  const std::string& from = *options_.repair_from;
  const auto theirs = Stat(from);
  if (!theirs) return UserError("{} does not exist, so nothing can be repaired from it", from);
  const auto ours = Stat(options_.directory);
  if (ours && ours->st_ino == theirs->st_ino && ours->st_dev == theirs->st_dev) {
    return UserError("{} is {} itself; repair it from another directory", from, options_.directory);
  }
  return {};
}

// Ids of the layers whose files are there, for a directory whose manifest cannot be read.
std::vector<std::string> Verifier::FindLayers() const {
  std::set<std::string> ids;
  for (const std::string& name :
       ListDirectory(LayersDirectory(report_.directory)).value_or(std::vector<std::string>{})) {
    for (const std::string_view suffix : {kIndexSuffix, kPagesSuffix, kPackedSuffix}) {
      if (!name.ends_with(suffix)) continue;
      const std::string id = name.substr(0, name.size() - suffix.size());
      if (IsValidId(id)) ids.insert(id);
    }
  }
  return {ids.begin(), ids.end()};
}

bool Verifier::Repair(uint32_t number, const ManifestLayer& entry, LayerVerdict& verdict) {
  auto repaired = RepairLayer(report_.directory, *options_.repair_from, entry, verdict);
  if (!repaired) {
    const std::string file = IsPackedLayer(report_.directory, entry.id)
                                 ? LayerPackedPath(report_.directory, entry.id)
                                 : LayerPagesPath(report_.directory, entry.id);
    verdict.damages.push_back(Whole(file, repaired.error()));
    return false;
  }
  for (Damage& damage : verdict.damages) {
    if (damage.bytes && repaired->index) {
      damage.places =
          PlacesOf(damage.pages.value_or(*damage.bytes), *repaired->index, number, &*manifest_);
    }
    report_.repaired.push_back(std::move(damage));
  }
  verdict = std::move(*repaired);
  return true;
}

void Verifier::CheckLayer(uint32_t number, const std::string& id, const ManifestLayer* entry) {
  VerifyOptions options;
  options.pages = !options_.quick;
  if (options_.progress) {
    options.progress = [this](Bytes done) {
      options_.progress(report_.checked + done, std::max(total_, report_.checked + done));
    };
  }
  LayerVerdict verdict =
      IsPackedLayer(report_.directory, id)
          ? VerifyPackedLayer(report_.directory, id, entry, options_.deep, options)
          : VerifyLayer(report_.directory, id, entry, options);
  report_.checked += verdict.checked;
  ++report_.layers;
  constexpr int kParts = 2;  // the index, then the pages
  for (int i = 0; i < kParts && !verdict.damages.empty(); ++i) {
    if (entry == nullptr || !options_.repair_from) break;
    if (!Repair(number, *entry, verdict)) break;
  }
  for (Damage& damage : verdict.damages) {
    if (damage.bytes && verdict.index) {
      damage.places = PlacesOf(damage.pages.value_or(*damage.bytes), *verdict.index, number,
                               manifest_ ? &*manifest_ : nullptr);
    }
    report_.damages.push_back(std::move(damage));
  }
  if (manifest_) indexes_.push_back(std::move(verdict.index));
}

void Verifier::CheckLayers() {
  if (!manifest_) {
    for (const std::string& id : FindLayers()) CheckLayer(0, id, nullptr);
    return;
  }
  for (const ManifestLayer& layer : manifest_->layers) total_ += layer.data;
  for (size_t i = 0; i < manifest_->layers.size(); ++i) {
    CheckLayer(static_cast<uint32_t>(i), manifest_->layers[i].id, &manifest_->layers[i]);
  }
}

// Manifest and indexes name the same places. Layers whose index is damaged were told already.
void Verifier::CheckAgreement() {
  const LayerInfo nothing;
  std::vector<LayerInfo> infos(indexes_.size());
  std::vector<const LayerInfo*> list;
  for (size_t i = 0; i < indexes_.size(); ++i) {
    infos[i].id = manifest_->layers[i].id;
    if (indexes_[i]) {
      infos[i].extents = std::move(indexes_[i]->tables.extents);
      infos[i].segments = std::move(indexes_[i]->tables.segments);
    }
    list.push_back(&infos[i]);
  }
  const Overlay overlay(list, report_.directory);
  const auto known = [&](uint32_t layer) { return indexes_[layer].has_value(); };
  for (const ManifestTask& task : manifest_->tasks) {
    for (const ManifestVma& vma : task.vmas) {
      if (vma.kind != VmaKind::kMapped || !known(vma.layer) ||
          !std::ranges::all_of(vma.deltas, known, &ManifestDelta::layer)) {
        continue;
      }
      const auto pages = overlay.Resolve(task.vpid, vma);
      if (pages) continue;
      Damage damage = Whole(ManifestPath(report_.directory), pages.error());
      damage.places.push_back({task.vpid, task.comm, vma.range, vma.name, vma.range});
      report_.damages.push_back(std::move(damage));
    }
  }
}

void Verifier::CheckWorkingSetFile() {
  const std::string path = WorkingSetPath(report_.directory);
  const auto set = ReadWorkingSet(report_.directory);
  if (!set) {
    report_.damages.push_back(Whole(path, set.error()));
  } else if (*set) {
    const auto fits = CheckWorkingSet(**set, *manifest_, path);
    if (!fits) report_.damages.push_back(Whole(path, fits.error()));
  }
}

void Verifier::CheckUserData() {
  if (!manifest_->user_data) return;
  const auto data = ReadUserData(report_.directory, *manifest_->user_data);
  if (!data) report_.damages.push_back(Whole(UserDataPath(report_.directory), data.error()));
}

void Verifier::CheckPagemap(criu::PageStreamId id) {
  const std::string directory = CriuDirectory(report_.directory);
  const std::string path = directory + "/" + criu::PagemapName(id);
  const auto pagemap = criu::ReadPagemap(directory, id);
  if (!pagemap) return report_.damages.push_back(Whole(path, pagemap.error()));
  const Bytes expected = pagemap->PresentBytes();
  const std::string pages = directory + "/" + criu::PagesName(pagemap->pages_id);
  const auto info = Stat(pages);
  if (!info) {
    if (expected.value != 0) report_.damages.push_back(Whole(pages, info.error()));
    return;
  }
  const auto size = static_cast<uint64_t>(info->st_size);
  if (size == expected.value) return;
  report_.damages.push_back(
      {pages,
       FileRange{FileOffset(std::min(size, expected.value)),
                 FileOffset(std::max(size, expected.value))},
       fmt::format("{} {}: it ends at offset {}, not at {} as {} says", pages,
                   size < expected.value ? "is truncated" : "has bytes too many", size,
                   expected.value, path),
       {}});
}

void Verifier::CheckCriu() {
  const std::string directory = CriuDirectory(report_.directory);
  const auto tasks = criu::ReadTasks(directory);
  if (!tasks) return report_.damages.push_back(Whole(directory, tasks.error()));
  for (const criu::Task& task : *tasks) {
    if (!task.has_memory()) continue;
    const auto vmas = criu::ReadVmas(directory, task.vpid);
    if (!vmas) {
      report_.damages.push_back(
          Whole(fmt::format("{}/mm-{}.img", directory, task.vpid), vmas.error()));
    }
    CheckPagemap({criu::StreamKind::kTask, task.vpid});
  }
  for (const std::string& name : ListDirectory(directory).value_or(std::vector<std::string>{})) {
    const auto stream = criu::ParsePagemapName(name);
    if (stream && stream->kind == criu::StreamKind::kSharedMemory) CheckPagemap(*stream);
  }
}

Result<VerifyDirectoryReport> Verifier::Run() {
  const Nanos begin = MonotonicNow();
  UNMOOR_ASSIGN(const DirectoryLock lock,
                DirectoryLock::Take(options_.directory,
                                    options_.repair_from ? LockUse::kWrite : LockUse::kRead));
  DirectoryLock source_lock;
  if (options_.repair_from) {
    UNMOOR_TRY(CheckRepairSource());
    UNMOOR_ASSIGN(source_lock, DirectoryLock::Take(*options_.repair_from, LockUse::kRead));
  }
  auto manifest = ReadManifest(options_.directory);
  // Without a manifest file it is no image directory, whatever else is there.
  if (!manifest && !Exists(ManifestPath(options_.directory)) &&
      !Exists(LayersDirectory(options_.directory))) {
    return Failure(manifest.error());
  }
  UNMOOR_ASSIGN(report_.directory, RealPath(options_.directory));
  if (manifest) {
    manifest_ = std::move(*manifest);
  } else {
    report_.damages.push_back(Whole(ManifestPath(report_.directory), manifest.error()));
  }
  CheckLayers();
  if (manifest_) {
    CheckAgreement();
    CheckUserData();
    CheckWorkingSetFile();
  }
  if (!manifest_ || manifest_->kind == ImageKind::kProcess) CheckCriu();
  report_.elapsed = MonotonicNow() - begin;
  return std::move(report_);
}

}  // namespace

Result<VerifyDirectoryReport> VerifyDirectory(const VerifyDirectoryOptions& options) {
  return Verifier(options).Run();
}

}  // namespace unmoor
