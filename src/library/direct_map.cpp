// DirectMap: a MapPlan carried out. See unmoor/direct_map.h.
//
// Invariant: `mapped_` lists exactly the memory that is ours to unmap, so that a failure half way
// leaves nothing behind. What is there already is never replaced: MAP_FIXED is used only inside
// memory this file has just mapped or reserved.
#include "unmoor/direct_map.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "library/map_plan.h"
#include "library/mapped_pieces.h"
#include "library/page_image_impl.h"
#include "library/status_from.h"
#include "os/file.h"
#include "os/own_memory.h"
#include "os/process_control.h"
#include "os/procfs.h"

namespace unmoor {
inline namespace v1 {
namespace {

VaddrRange Moved(VaddrRange range, uint64_t by) {
  return {Vaddr(range.begin.value + by), Vaddr(range.end.value + by)};
}

// What keeps `range` from being mapped.
Status Occupied(VaddrRange range, const PageImage::Impl& image) {
  std::string what = "something";
  if (const auto maps = ReadMaps(OwnPid())) {
    const auto there =
        std::ranges::find_if(*maps, [&](const VmaInfo& vma) { return vma.range.Overlaps(range); });
    if (there != maps->end()) {
      what = fmt::format("{} ({})", there->name.empty() ? "anonymous memory" : there->name,
                         there->range);
    }
  }
  return MakeStatus(StatusCode::kBusy, "{} of {} cannot be mapped at its address: {} is there",
                    range, image.directory, what);
}

}  // namespace

class DirectMap::Impl {
 public:
  explicit Impl(std::shared_ptr<const PageImage::Impl> image) : image_(std::move(image)) {}
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() { (void)Unmap(); }

  Status Map(Placement placement) {
    UNMOOR_STATUS_ASSIGN(const std::vector<VmaInfo> maps, ReadMaps(OwnPid()));
    const size_t limit = MaxMapCount();
    UNMOOR_STATUS_ASSIGN(const std::vector<PlannedVma> plan,
                         PlanMap(*image_, limit - std::min(limit, maps.size())));
    auto vma = plan.begin();
    for (const ImageRange& range : image_->ranges) {
      const VaddrRange recorded{Vaddr(range.address), Vaddr(range.address + range.size)};
      uint64_t by = 0;
      if (placement == Placement::kAnywhere) {
        UNMOOR_STATUS_ASSIGN(const VaddrRange reserved,
                             ReserveAddresses(recorded.size(), range.address));
        by = reserved.begin.value - range.address;
        mapped_.push_back(reserved);
      }
      for (; vma != plan.end() && vma->base.range.begin < recorded.end; ++vma) {
        if (Status status = MapVma(*vma, by, placement); !status.ok()) return status;
      }
      // SAFETY: memory mapped above, or about to be by the loop over `plan`.
      ranges_.push_back(
          {range.address,
           {reinterpret_cast<void*>(range.address + by), static_cast<size_t>(range.size)},
           range.protection});
    }
    return {};
  }

  Status Unmap() {
    Status first;
    for (const VaddrRange& range : mapped_) {
      auto result = UnmapMemory(range);
      if (!result && first.ok()) first = StatusFrom(result.error());
    }
    Release();
    return first;
  }
  void Release() {
    mapped_.clear();
    ranges_.clear();
    pieces_.clear();
  }

  [[nodiscard]] const std::vector<MappedRange>& ranges() const { return ranges_; }
  [[nodiscard]] const std::vector<MappedPiece>& pieces() const { return pieces_; }

 private:
  Status MapVma(const PlannedVma& vma, uint64_t by, Placement placement) {
    const VaddrRange whole = Moved(vma.base.range, by);
    const bool own = placement == Placement::kAnywhere;
    const int prot = vma.copied.empty() ? vma.prot : vma.prot | PROT_READ | PROT_WRITE;
    const auto base = MapFilePrivately(FileOf(vma.base), vma.base.offset, whole, prot,
                                       own ? MapAt::kReplace : MapAt::kFree);
    if (!base && base.error().errnum() == EEXIST) return Occupied(whole, *image_);
    if (!base) return MapFailed(base.error());
    if (!own) mapped_.push_back(whole);
    for (const OverlayRun& run : vma.copied) {
      const VaddrRange to = Moved(run.range, by);
      // SAFETY: inside `whole`, mapped writable just now.
      const std::span memory(reinterpret_cast<std::byte*>(to.begin.value), to.size().value);
      const auto read = ReadExactlyAt(FileOf(run), memory, run.offset,
                                      image_->layers[run.layer]->reader().pages_path());
      if (!read) return StatusFrom(read.error(), StatusCode::kDamaged);
    }
    if (prot != vma.prot) UNMOOR_STATUS_TRY(ProtectMemory(whole, vma.prot));
    for (const OverlayRun& run : vma.mapped) {
      const auto mapped = MapFilePrivately(FileOf(run), run.offset, Moved(run.range, by), vma.prot,
                                           MapAt::kReplace);
      if (!mapped) return MapFailed(mapped.error());
    }
    AddPieces(vma, by);
    return {};
  }

  // The base without what lies over it, and the mapped runs; ascending.
  void AddPieces(const PlannedVma& vma, uint64_t by) {
    OverlayRun rest = vma.base;
    const auto add = [&](const OverlayRun& run) {
      if (run.range.empty()) return;
      pieces_.push_back({Moved(run.range, by), run.offset, image_->layers[run.layer]});
    };
    for (const OverlayRun& run : vma.mapped) {
      add({{rest.range.begin, run.range.begin}, rest.layer, rest.offset});
      add(run);
      rest.offset = rest.offset + (run.range.end - rest.range.begin);
      rest.range.begin = run.range.end;
    }
    add(rest);
  }

  [[nodiscard]] int FileOf(const OverlayRun& run) const {
    return image_->layers[run.layer]->reader().pages_fd().get();
  }

  [[nodiscard]] Status MapFailed(const Error& error) const {
    if (error.errnum() == ENOMEM) {
      return {StatusCode::kNoMemory,
              error.WithContext(image_->directory).message() +
                  "; see vm.max_map_count, vm.overcommit_memory and ulimit -v",
              ENOMEM};
    }
    return StatusFrom(error.WithContext(image_->directory));
  }

  std::shared_ptr<const PageImage::Impl> image_;
  std::vector<VaddrRange> mapped_;
  std::vector<MappedRange> ranges_;
  std::vector<MappedPiece> pieces_;
};

std::vector<MappedPiece> PiecesOf(const DirectMap& map) {
  return map.impl().pieces();
}

DirectMap::DirectMap(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DirectMap::DirectMap(DirectMap&&) noexcept = default;
DirectMap& DirectMap::operator=(DirectMap&&) noexcept = default;
DirectMap::~DirectMap() = default;

StatusOr<DirectMap> DirectMap::Map(const PageImage& image, const MapOptions& options) {
  auto impl = std::make_unique<Impl>(image.impl());
  if (Status status = impl->Map(options.placement); !status.ok()) return status;
  return DirectMap(std::move(impl));
}

const std::vector<MappedRange>& DirectMap::ranges() const {
  return impl_->ranges();
}

void* DirectMap::Find(uint64_t recorded_address) const {
  for (const MappedRange& range : impl_->ranges()) {
    if (recorded_address < range.recorded_address) break;
    const uint64_t distance = recorded_address - range.recorded_address;
    if (distance < range.memory.size) return static_cast<std::byte*>(range.memory.begin) + distance;
  }
  return nullptr;
}

Status DirectMap::Unmap() {
  return impl_->Unmap();
}

void DirectMap::Release() {
  impl_->Release();
}

}  // namespace v1
}  // namespace unmoor
