// PageRouter: sends each page CRIU hands us to the layer or to CRIU's own page images.
//
// When a task's pages begin, the task is frozen; its VMAs are read then and the plan is made. Pages
// of mapped VMAs go to the layer, all others (special VMAs, shared memory, small remnants) to
// pagemap and pages images in CRIU's format. Close() makes everything durable when asked to, and
// only then does CRIU get its answer.
//
// With a parent (parent.h) the layer is a delta: of a VMA that stands on the parent's layers only
// pages that differ from them are written, and pages the parent shows but CRIU does not send
// (given back, never touched again) are written as pages of zeros, so that none of the parent's
// bytes can show through.
//
// Used by the thread of criu::PageServer::Run; read by others only after Run has returned. The
// first failure is kept: it, not CRIU's complaint about it, is what the user should read.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/parent.h"
#include "checkpoint/plan.h"
#include "criu/page_images.h"
#include "criu/page_server.h"
#include "image/layer_writer.h"

namespace unmoor {

// What became of one task's memory.
struct RoutedTask {
  Pid pid;
  std::vector<PlannedVma> plan;
  std::vector<Bytes> saved;                      // of each VMA of the plan: bytes of pages received
  std::vector<std::optional<ParentBase>> bases;  // of each VMA: what it stands on
  Vaddr settled;  // the parent's pages below it have been received or hidden
};

class PageRouter : public criu::PageSink {
 public:
  struct Options {
    Pid root;
    std::string criu_directory;
    std::string layers_directory;
    std::string layer_id;
    bool sync = true;  // Close() returns when all is on disk
    CheckpointPlanOptions plan;
    const Parent* parent = nullptr;
    bool parent_asked_for = false;  // rather than found
    std::function<void(Bytes)> progress;  // bytes received so far; now and then
  };
  explicit PageRouter(Options options)
      : options_(std::move(options)), page_images_(options_.criu_directory) {}

  [[nodiscard]] Result<> Open(criu::PageStreamId id) override;
  [[nodiscard]] Result<> Pages(criu::PageStreamId id, Vaddr at, uint32_t flags,
                               std::span<const std::byte> data) override;
  [[nodiscard]] Result<> Absent(criu::PageStreamId id, VaddrRange range, uint32_t flags) override;
  [[nodiscard]] Result<> Close() override;

  [[nodiscard]] const std::optional<Error>& first_error() const { return first_error_; }
  [[nodiscard]] const std::map<uint32_t, RoutedTask>& tasks() const { return tasks_; }
  // Nothing when no VMA was worth mapping.
  [[nodiscard]] const std::optional<LayerInfo>& layer() const { return layer_; }
  [[nodiscard]] Bytes criu_bytes() const { return page_images_.written(); }

 private:
  [[nodiscard]] Result<Pid> FindTask(uint32_t vpid);
  [[nodiscard]] Result<> OpenTask(uint32_t vpid);
  [[nodiscard]] Result<> RoutePages(criu::PageStreamId id, Vaddr at, uint32_t flags,
                                    std::span<const std::byte> data);
  [[nodiscard]] Result<> WriteToLayer(uint32_t vpid, const RoutedTask& task, size_t vma, Vaddr at,
                                      std::span<const std::byte> data);
  // Hides the pages the parent shows below `end` and that have not come.
  [[nodiscard]] Result<> HideVanished(uint32_t vpid, RoutedTask& task, Vaddr end);
  [[nodiscard]] Result<> Finish();
  Result<> Keep(Result<> result);

  Options options_;
  criu::PageImageWriter page_images_;
  std::optional<LayerWriter> writer_;
  std::map<uint32_t, Pid> pids_;  // virtual to ours; filled at the first Open
  std::map<uint32_t, RoutedTask> tasks_;
  size_t cursor_ = 0;  // VMA of the open task where the last page was
  struct FirstPage {
    criu::PageStreamId id;
    Vaddr at;
    uint32_t flags;
    std::vector<std::byte> data;
  };
  std::vector<FirstPage> first_pages_;
  std::vector<std::byte> parent_bytes_;
  std::optional<LayerInfo> layer_;
  std::optional<Error> first_error_;
  Bytes received_;
  Nanos told_at_;
};

}  // namespace unmoor
