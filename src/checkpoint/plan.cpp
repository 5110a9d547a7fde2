// See plan.h.
#include "checkpoint/plan.h"

#include <algorithm>

#include "remap/plan.h"

namespace unmoor {
namespace {

// The VMA as the program means it: what an agent's userfaultfd watches is not watched by the
// program's.
PlannedVma Unmapped(const VmaInfo& vma, const MappedLayers& layers) {
  PlannedVma item{vma, false, {}, {}};
  if (!layers.find) return item;
  const auto layer = layers.find(vma);
  if (!layer && !vma.IsPrivateAnonymous()) return item;
  std::erase_if(item.vma.vm_flags,
                [](const std::string& flag) { return flag == "um" || flag == "uw"; });
  if (!layer) return item;
  item.pieces.push_back({vma.range, *layer, vma.offset});
  item.vma.offset = {};
  item.vma.dev_major = item.vma.dev_minor = 0;
  item.vma.inode = 0;
  item.vma.name.clear();
  return item;
}

bool WereOne(const PlannedVma& a, const PlannedVma& b, const MappedLayers& layers) {
  if (a.vma.range.end != b.vma.range.begin || !a.why.empty() || !b.why.empty()) return false;
  if (a.pieces.empty() && b.pieces.empty()) return false;
  return SameWish(a.vma, b.vma) && std::ranges::any_of(layers.whole, [&](VaddrRange whole) {
           return whole.Contains(a.vma.range) && whole.Contains(b.vma.range);
         });
}

void Join(PlannedVma& to, const PlannedVma& next) {
  to.vma.range.end = next.vma.range.end;
  to.vma.rss += next.vma.rss;
  to.vma.anonymous += next.vma.anonymous;
  to.pieces.insert(to.pieces.end(), next.pieces.begin(), next.pieces.end());
}

}  // namespace

std::string_view WhyNotTakeable(const VmaInfo& vma) {
  if (vma.shared) return "shared";
  if (vma.inode != 0 || vma.dev_major != 0 || vma.dev_minor != 0) return "maps a file";
  if (!vma.IsPrivateAnonymous()) return "special";  // [vdso], [vvar], [vsyscall], [uprobes]
  struct Rule {
    const char* flag;
    std::string_view why;
  };
  // The two-letter names of Documentation/filesystems/proc.rst.
  static constexpr Rule kRules[] = {
      {"gd", "grows down"},
      {"ht", "hugetlb"},
      {"lo", "locked"},
      {"pf", "device memory"},
      {"io", "device memory"},
      {"wf", "wiped on fork"},
      {"dp", "droppable"},
      {"ss", "shadow stack"},
      {"gu", "has guard pages"},
      {"mg", "mergeable (KSM)"},
      {"mm", "device memory"},
      {"um", "watched by a userfaultfd"},
      {"uw", "watched by a userfaultfd"},
  };
  for (const Rule& rule : kRules) {
    if (vma.HasFlag(rule.flag)) return rule.why;
  }
  return {};
}

std::vector<PlannedVma> PlanTask(std::span<const VmaInfo> vmas,
                                 const CheckpointPlanOptions& options, const MappedLayers& layers) {
  std::vector<PlannedVma> plan;
  plan.reserve(vmas.size());
  for (const VmaInfo& vma : vmas) {
    PlannedVma item = Unmapped(vma, layers);
    item.why = WhyNotTakeable(item.vma);
    if (!plan.empty() && WereOne(plan.back(), item, layers)) {
      Join(plan.back(), item);
    } else {
      plan.push_back(std::move(item));
    }
  }
  for (PlannedVma& item : plan) {
    const bool few = item.pieces.empty() && item.vma.anonymous < options.least;
    if (item.why.empty() && few) item.why = "few pages";
    item.mapped = item.why.empty();
  }
  return plan;
}

}  // namespace unmoor
