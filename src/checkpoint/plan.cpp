// See plan.h.
#include "checkpoint/plan.h"

namespace unmoor {

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
                                 const CheckpointPlanOptions& options) {
  std::vector<PlannedVma> plan;
  plan.reserve(vmas.size());
  for (const VmaInfo& vma : vmas) {
    PlannedVma item{vma, false, WhyNotTakeable(vma)};
    if (item.why.empty() && vma.anonymous < options.least) item.why = "few pages";
    item.mapped = item.why.empty();
    plan.push_back(std::move(item));
  }
  return plan;
}

}  // namespace unmoor
