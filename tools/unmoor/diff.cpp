// `unmoor diff`.
#include "store/diff.h"

#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"

namespace unmoor::cli {
namespace {

struct DiffArguments {
  std::string before;
  std::string after;
  bool json = false;
};

std::string Kind(bool before, bool after) {
  return !before ? "added" : !after ? "removed" : "changed";
}

nlohmann::json ToJson(const std::optional<VaddrRange>& range) {
  if (!range) return nullptr;
  return {{"begin", fmt::format("{:x}", range->begin.value)},
          {"end", fmt::format("{:x}", range->end.value)}};
}

nlohmann::json ToJson(const DiffReport& report) {
  nlohmann::json tasks = nlohmann::json::array();
  for (const TaskDifference& task : report.tasks) {
    nlohmann::json vmas = nlohmann::json::array();
    for (const VmaDifference& vma : task.vmas) {
      vmas.push_back({{"kind", Kind(vma.before.has_value(), vma.after.has_value())},
                      {"before", ToJson(vma.before)},
                      {"after", ToJson(vma.after)},
                      {"name", vma.name},
                      {"changed_pages", vma.changed.value},
                      {"changed_bytes", ToBytes(vma.changed).value}});
    }
    tasks.push_back({{"vpid", task.vpid},
                     {"task", task.comm},
                     {"kind", Kind(task.before, task.after)},
                     {"vmas", std::move(vmas)}});
  }
  return {{"tasks", std::move(tasks)},
          {"changed_bytes", report.changed.value},
          {"compared_bytes", report.compared.value},
          {"pages_bytes_before", report.pages_before.value},
          {"pages_bytes_after", report.pages_after.value}};
}

std::string ToText(const VmaDifference& vma) {
  std::string bounds = fmt::format("{}", vma.after ? *vma.after : *vma.before);
  if (vma.before && vma.after && vma.before != vma.after) {
    bounds += fmt::format(" (was {})", *vma.before);
  }
  return fmt::format("  {:<8} {}  {} page{}, {}{}\n",
                     Kind(vma.before.has_value(), vma.after.has_value()), bounds, vma.changed.value,
                     vma.changed.value == 1 ? "" : "s", HumanBytes(ToBytes(vma.changed)),
                     vma.name.empty() ? "" : "  " + vma.name);
}

int RunDiff(const DiffArguments& arguments) {
  const auto report = Diff(arguments.before, arguments.after);
  if (!report) return Report(report.error(), arguments.json);
  if (arguments.json) {
    PrintJson(ToJson(*report));
    return kExitSuccess;
  }
  for (const TaskDifference& task : report->tasks) {
    const bool both = task.before && task.after;
    Print(fmt::format("task {} ({}){}\n", task.vpid, task.comm,
                      both ? "" : ", " + Kind(task.before, task.after)));
    for (const VmaDifference& vma : task.vmas) Print(ToText(vma));
  }
  Print(fmt::format("{} differ, of {} before and {} after\n", HumanBytes(report->changed),
                    HumanBytes(report->pages_before), HumanBytes(report->pages_after)));
  return kExitSuccess;
}

}  // namespace

Action ConfigureDiff(CLI::App& app) {
  const auto arguments = std::make_shared<DiffArguments>();
  SetUsage(app, "Usage: unmoor diff A B [--json]");
  app.add_option("before", arguments->before, "An image directory")->required()->option_text("A");
  app.add_option("after", arguments->after, "Another one")->required()->option_text("B");
  app.add_flag("--json", arguments->json, "One JSON object on stdout");
  app.footer(
      "\nBy task and VMA: how many pages have other contents in B than in A. Pages that are "
      "nowhere\n"
      "are zeros. What both have from one place of one layer is equal and not read.\n");
  return [arguments](const Invocation&) { return RunDiff(*arguments); };
}

}  // namespace unmoor::cli
