// See map_plan.h.
#include "library/map_plan.h"

#include <algorithm>
#include <cerrno>
#include <functional>

namespace unmoor {
inline namespace v1 {
namespace {

// The length from which runs are mapped so that at most `count` of them are.
Bytes ShortestMapped(const PageImage::Impl& image, size_t count) {
  std::vector<uint64_t> lengths;
  for (const VmaPages& pages : image.pages) {
    for (const OverlayRun& run : pages.deltas) {
      if (run.range.size() >= kMinMappedRun) lengths.push_back(run.range.size().value);
    }
  }
  if (lengths.size() <= count) return kMinMappedRun;
  std::ranges::nth_element(lengths, lengths.begin() + static_cast<ptrdiff_t>(count),
                           std::greater<>());
  // One longer than the first that is too many.
  return Bytes(lengths[count] + kPageSize);
}

}  // namespace

Result<std::vector<PlannedVma>> PlanMap(const PageImage::Impl& image, size_t mappings_left) {
  const size_t bases = image.vmas().size();
  if (bases > mappings_left) {
    return Failure(Error(ErrorKind::kMachine, ENOMEM,
                         fmt::format("{} needs {} mappings, the process may have {} more; raise "
                                     "vm.max_map_count",
                                     image.directory, bases, mappings_left)));
  }
  // Half of what is left stays the program's.
  const Bytes shortest = ShortestMapped(image, (mappings_left - bases) / 4);
  std::vector<PlannedVma> plan;
  for (size_t i = 0; i < bases; ++i) {
    const ManifestVma& vma = image.vmas()[i];
    PlannedVma planned{{vma.range, vma.layer, vma.offset}, vma.prot, {}, {}};
    for (const OverlayRun& run : image.pages[i].deltas) {
      (run.range.size() >= shortest ? planned.mapped : planned.copied).push_back(run);
    }
    plan.push_back(std::move(planned));
  }
  return plan;
}

}  // namespace v1
}  // namespace unmoor
