// See simulated_tree.h.
#include "simulated_tree.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "checkpoint/parent.h"
#include "criu/image_codec.h"
#include "criu/metadata.h"
#include "criu/page_images.h"
#include "image/delta_writer.h"
#include "image/layer_reader.h"
#include "image/layout.h"
#include "image/manifest.h"
#include "image/publisher.h"
#include "os/file.h"
#include "proto/image.pb.h"
#include "restore/plan.h"

namespace unmoor {
namespace {

constexpr uint64_t kFirstPage = 0x10000;

Vaddr AddressOf(uint64_t page) {
  return Vaddr((kFirstPage + page) * kPageSize);
}
uint64_t PageAt(Vaddr at) {
  return at.value / kPageSize - kFirstPage;
}

std::vector<std::byte> Contents(uint64_t word) {
  std::vector<std::byte> page(kPageSize);
  std::memcpy(&page[(word * 8) % kPageSize], &word, sizeof word);
  return page;
}

// As PageRouter does it.
Result<> WriteTask(DeltaWriter& writer, const Parent* parent, uint32_t vpid,
                   const SimulatedTask& task) {
  const PageSource now = [&](Vaddr at, std::span<std::byte> to) {
    const auto page = Contents(task.Read(PageAt(at)));
    std::memcpy(to.data(), page.data(), to.size());
    return true;
  };
  std::vector<DeltaVma> vmas;
  for (const auto& [first, last] : task.vmas) {
    VmaInfo info;
    info.range = {AddressOf(first), AddressOf(last)};
    const auto present = std::distance(task.pages.lower_bound(first), task.pages.lower_bound(last));
    info.anonymous = Bytes(kPageSize * static_cast<uint64_t>(present));
    DeltaVma vma{info.range, {}};
    if (parent != nullptr) vma.base = parent->Find(vpid, info);
    if (!vma.base && task.parent != 0) {
      UNMOOR_ASSIGN(vma.base, writer.FindShared(task.parent, info.range));
      if (vma.base && !writer.IsMostlyShared(*vma.base, info.anonymous, now)) vma.base.reset();
    }
    vmas.push_back(std::move(vma));
  }
  UNMOOR_TRY(writer.AddTask(vpid, std::move(vmas)));
  for (const auto& [page, word] : task.pages) {
    UNMOOR_TRY(writer.Write(vpid, AddressOf(page), Contents(word)));
  }
  return {};
}

Result<> LinkLayers(const Parent& parent, const Manifest& manifest, const std::string& directory) {
  for (const LayerReader& old : parent.layers()) {
    const auto used = std::ranges::find(manifest.layers, old.id(), &ManifestLayer::id);
    if (used == manifest.layers.end()) continue;
    UNMOOR_TRY(LinkOrCopyFile(old.pages_fd().get(), LayerPagesPath(directory, old.id())));
    UNMOOR_TRY(LinkOrCopyFile(old.index_fd().get(), LayerIndexPath(directory, old.id())));
  }
  return {};
}

Result<std::vector<std::byte>> ReadLayer(const LayerReader& layer, FileOffset at) {
  std::vector<std::byte> page(kPageSize);
  UNMOOR_TRY(ReadExactlyAt(layer.pages_fd().get(), page, at, layer.pages_path()));
  return page;
}

Result<> ExpectTask(const criu::TaskMapping& plan, const std::vector<LayerReader>& layers,
                    const SimulatedTask& task) {
  std::map<Vaddr, std::vector<std::byte>> shown;
  for (const criu::DirectMapping& mapping : plan.mappings) {
    const LayerReader& layer = layers[mapping.layer];
    const auto vma = task.vmas.find(PageAt(mapping.range.begin));
    if (vma == task.vmas.end() || AddressOf(vma->second) != mapping.range.end) {
      return MachineError("task {} has no VMA {}", plan.vpid, mapping.range);
    }
    for (Vaddr at = mapping.range.begin; at < mapping.range.end; at = at + Bytes(kPageSize)) {
      UNMOOR_ASSIGN(shown[at], ReadLayer(layer, mapping.offset + (at - mapping.range.begin)));
    }
    for (uint64_t i = 0; i < 3; ++i) {
      UNMOOR_ASSIGN(const auto behind,
                    ReadLayer(layer, mapping.offset + mapping.range.size() + Bytes(i * kPageSize)));
      if (behind != Contents(0)) {
        return MachineError("task {}: {} grows into old bytes", plan.vpid, mapping.range);
      }
    }
  }
  for (const criu::DirectMapping& load : plan.loads) {
    for (Vaddr at = load.range.begin; at < load.range.end; at = at + Bytes(kPageSize)) {
      UNMOOR_ASSIGN(shown[at],
                    ReadLayer(layers[load.layer], load.offset + (at - load.range.begin)));
    }
  }
  for (const auto& [at, bytes] : shown) {
    if (bytes != Contents(task.Read(PageAt(at)))) {
      return MachineError("task {}: page {} is not what the program had", plan.vpid, PageAt(at));
    }
  }
  return {};
}

Result<> WriteImage(const std::string& path, criu::ImageType type,
                    const google::protobuf::MessageLite& message) {
  criu::ImageBuilder image(type);
  image.Append(message.SerializeAsString());
  return WriteFile(path, image.data());
}

Result<> WriteMetadata(const std::string& directory, uint32_t vpid, const SimulatedTask& task) {
  criu::proto::CoreEntry core;
  core.mutable_tc()->set_task_state(static_cast<uint32_t>(criu::TaskState::kAlive));
  core.mutable_tc()->set_exit_code(0);
  core.mutable_tc()->set_comm("task");
  UNMOOR_TRY(
      WriteImage(fmt::format("{}/core-{}.img", directory, vpid), criu::ImageType::kCore, core));
  criu::proto::MmEntry mm;
  using Mm = criu::proto::MmEntry;
  for (const auto set :
       {&Mm::set_start_code, &Mm::set_end_code, &Mm::set_start_data, &Mm::set_end_data,
        &Mm::set_start_stack, &Mm::set_start_brk, &Mm::set_brk, &Mm::set_arg_start,
        &Mm::set_arg_end, &Mm::set_env_start, &Mm::set_env_end}) {
    (mm.*set)(kPageSize);
  }
  mm.set_exe_file_id(1);
  for (const auto& [first, last] : task.vmas) {
    criu::proto::VmaEntry& vma = *mm.add_vmas();
    vma.set_start(AddressOf(first).value);
    vma.set_end(AddressOf(last).value);
    vma.set_pgoff(0);
    vma.set_shmid(0);
    vma.set_prot(PROT_READ | PROT_WRITE);
    vma.set_flags(MAP_PRIVATE | MAP_ANONYMOUS);
    vma.set_status(criu::kVmaRegular | criu::kVmaAnonPrivate);
    vma.set_fd(-1);
  }
  return WriteImage(fmt::format("{}/mm-{}.img", directory, vpid), criu::ImageType::kMm, mm);
}

}  // namespace

void SimulatedTask::Unmap(uint64_t begin, uint64_t end) {
  std::map<uint64_t, uint64_t> left;
  for (const auto& [first, last] : vmas) {
    if (first < std::min(last, begin)) left[first] = std::min(last, begin);
    if (std::max(first, end) < last) left[std::max(first, end)] = last;
  }
  vmas = std::move(left);
  pages.erase(pages.lower_bound(begin), pages.lower_bound(end));
}

void SimulatedTask::Map(uint64_t begin, uint64_t end) {
  Unmap(begin, end);
  vmas[begin] = end;
}

Result<> DumpTree(const SimulatedTree& tree, const std::string& directory,
                  const std::optional<std::string>& parent_directory, bool sync) {
  std::optional<Parent> parent;
  if (parent_directory) {
    UNMOOR_ASSIGN(Parent opened, Parent::Open(*parent_directory));
    parent.emplace(std::move(opened));
  }
  UNMOOR_ASSIGN(Publisher publisher, Publisher::Begin(directory));
  UNMOOR_TRY(MakeDirectory(LayersDirectory(publisher.path())));
  UNMOOR_TRY(MakeDirectory(CriuDirectory(publisher.path())));
  UNMOOR_TRY(WriteFile(CriuDirectory(publisher.path()) + "/inventory.img", "criu's"));
  UNMOOR_ASSIGN(const std::string id, NewId());
  DeltaWriter writer(LayersDirectory(publisher.path()), id,
                     parent ? std::span(parent->layers()) : std::span<const LayerReader>(),
                     tree.size() > 1);
  Manifest manifest;
  UNMOOR_ASSIGN(manifest.checkpoint_id, NewId());
  if (parent) manifest.parent_id = parent->manifest().checkpoint_id;
  manifest.root_vpid = 1;
  for (const auto& [vpid, task] : tree) {
    UNMOOR_TRY(WriteTask(writer, parent ? &*parent : nullptr, vpid, task));
    ManifestTask entry{vpid, task.parent, "task", "running", {}};
    for (const auto& [first, last] : task.vmas) {
      ManifestVma vma;
      vma.range = {AddressOf(first), AddressOf(last)};
      vma.kind = VmaKind::kMapped;
      entry.vmas.push_back(vma);
    }
    manifest.tasks.push_back(std::move(entry));
  }
  UNMOOR_ASSIGN(const auto layer, writer.Finish(sync));
  if (layer) UNMOOR_TRY(writer.Describe(manifest, *layer, directory));
  manifest.written = layer ? layer->data_bytes : Bytes(0);
  if (parent) UNMOOR_TRY(LinkLayers(*parent, manifest, publisher.path()));
  // What no VMA needs is not kept: here the new layer, where nothing changed.
  if (layer &&
      std::ranges::find(manifest.layers, id, &ManifestLayer::id) == manifest.layers.end()) {
    UNMOOR_TRY(RemoveFile(LayerPagesPath(publisher.path(), id)));
    UNMOOR_TRY(RemoveFile(LayerIndexPath(publisher.path(), id)));
  }
  UNMOOR_TRY(WriteManifest(publisher.path(), manifest));
  return publisher.Publish(sync);
}

Result<> DumpStock(const SimulatedTree& tree, const std::string& directory, bool pages) {
  criu::ImageBuilder tasks(criu::ImageType::kPstree);
  criu::PageImageWriter writer(directory);
  for (const auto& [vpid, task] : tree) {
    criu::proto::PstreeEntry entry;
    entry.set_pid(vpid);
    entry.set_ppid(task.parent);
    entry.set_pgid(1);
    entry.set_sid(1);
    entry.add_threads(vpid);
    tasks.Append(entry.SerializeAsString());
    UNMOOR_TRY(WriteMetadata(directory, vpid, task));
    const criu::PageStreamId stream{criu::StreamKind::kTask, vpid};
    UNMOOR_TRY(writer.Open(stream));
    for (const auto& [page, word] : task.pages) {
      UNMOOR_TRY(writer.Pages(stream, AddressOf(page), criu::kPagePresent, Contents(word)));
      if (!pages) break;  // CRIU refuses a task without any
    }
  }
  UNMOOR_TRY(WriteFile(directory + "/inventory.img", "criu's"));
  UNMOOR_TRY(WriteFile(directory + "/pstree.img", tasks.data()));
  return writer.Finish(false);
}

Result<> ExpectShows(const std::string& directory, const SimulatedTree& tree) {
  UNMOOR_ASSIGN(const Manifest manifest, ReadManifest(directory));
  std::vector<LayerReader> layers;
  std::vector<LayerInfo> infos;
  for (const ManifestLayer& entry : manifest.layers) {
    UNMOOR_ASSIGN(LayerReader layer, LayerReader::Open(directory, entry));
    infos.push_back(layer.info());
    layers.push_back(std::move(layer));
  }
  UNMOOR_ASSIGN(const RestorePlan plan, PlanRestore(manifest, infos, directory));
  size_t mapped = 0;
  for (const criu::TaskMapping& task : plan.tasks) {
    const auto expected = tree.find(task.vpid);
    if (expected == tree.end()) return MachineError("there is no task {}", task.vpid);
    UNMOOR_TRY(ExpectTask(task, layers, expected->second));
    mapped += task.mappings.size();
  }
  size_t wanted = 0;
  for (const auto& [vpid, task] : tree) wanted += task.vmas.size();
  if (mapped != wanted) return MachineError("{} VMAs are mapped, there are {}", mapped, wanted);
  return {};
}

}  // namespace unmoor
