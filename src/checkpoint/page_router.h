// PageRouter: sends each page CRIU hands us to the layer or to CRIU's own page images.
//
// When a task's pages begin, the task is frozen; its VMAs are read then and the plan is made. Pages
// of mapped VMAs go to the layer, all others (special VMAs, shared memory, small remnants) to
// pagemap and pages images in CRIU's format. Close() makes everything durable when asked to, and
// only then does CRIU get its answer. Of a program that runs on nothing can be lost: it is let go
// once its pages are here, and Complete() does the rest.
//
// With a parent (parent.h), and of forked children, the layer holds differences only
// (delta_writer.h): what a VMA stands on is decided here, while its task is frozen.
//
// Tasks may still map layers of the parent (`still_mapped`): then CRIU sends what was copied on
// write, and all else is what the layer shows.
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
#include "image/delta_writer.h"

namespace unmoor {

// What became of one task's memory.
struct RoutedTask {
  Pid pid;
  std::vector<PlannedVma> plan;
  std::vector<Bytes> saved;  // of each VMA of the plan: bytes of pages received
};

class PageRouter : public criu::PageSink {
 public:
  struct Options {
    Pid root;
    std::string criu_directory;
    std::string layers_directory;
    std::string layer_id;
    bool sync = true;  // Close() returns when all is on disk; else nothing is before Complete()
    CheckpointPlanOptions plan;
    const Parent* parent = nullptr;
    bool still_mapped = false;            // tasks may map the parent's layers
    std::function<void(Bytes)> progress;  // bytes received so far; now and then
  };
  explicit PageRouter(Options options)
      : options_(std::move(options)), page_images_(options_.criu_directory) {}

  [[nodiscard]] Result<> Open(criu::PageStreamId id) override;
  [[nodiscard]] Result<> Pages(criu::PageStreamId id, Vaddr at, uint32_t flags,
                               std::span<const std::byte> data) override;
  [[nodiscard]] Result<std::span<std::byte>> Room(criu::PageStreamId id, Vaddr at,
                                                  Bytes want) override;
  [[nodiscard]] Result<> Filled(criu::PageStreamId id, Vaddr at, Bytes size) override;
  [[nodiscard]] Result<> Absent(criu::PageStreamId id, VaddrRange range, uint32_t flags) override;
  [[nodiscard]] Result<> Close() override;

  // To be called once CRIU has ended well. What is left to do while nobody stands still.
  [[nodiscard]] Result<> Complete();

  [[nodiscard]] const std::optional<Error>& first_error() const { return first_error_; }
  [[nodiscard]] const std::map<uint32_t, RoutedTask>& tasks() const { return tasks_; }
  // Nothing when no VMA was worth mapping.
  [[nodiscard]] const std::optional<LayerInfo>& layer() const { return layer_; }
  // Where the pages of the mapped VMAs are; REQUIRES a layer.
  [[nodiscard]] Result<> DescribeLayers(Manifest& manifest, const std::string& directory) const {
    return writer_->Describe(manifest, *layer_, directory);
  }
  // It failed since the program cannot be dumped as long as it maps its image.
  [[nodiscard]] bool must_be_remapped() const { return must_be_remapped_; }
  // It failed because a thread was frozen just as it took a fault, or not at all; the next time
  // that will not be so.
  [[nodiscard]] bool ill_frozen() const { return ill_frozen_; }
  [[nodiscard]] Bytes received() const { return received_; }
  [[nodiscard]] Bytes criu_bytes() const { return page_images_.written(); }

 private:
  [[nodiscard]] Result<Pid> FindTask(uint32_t vpid);
  [[nodiscard]] Result<> OpenTask(uint32_t vpid);
  [[nodiscard]] Result<> CheckFrozen(Pid pid);
  [[nodiscard]] Result<std::vector<PlannedVma>> Plan(uint32_t vpid, Pid pid);
  [[nodiscard]] Result<std::optional<LayerBase>> FindBase(uint32_t vpid, Pid pid,
                                                          const PlannedVma& item);
  [[nodiscard]] Result<> RoutePages(criu::PageStreamId id, Vaddr at, uint32_t flags,
                                    std::span<const std::byte> data);
  [[nodiscard]] Result<> CountReceived(Bytes size);
  // The VMA of the plan that holds `at`, where cursor_ is then.
  [[nodiscard]] Result<const PlannedVma*> FindVma(uint32_t vpid, Vaddr at);
  [[nodiscard]] Result<> Finish();
  Result<> Keep(Result<> result);

  Options options_;
  criu::PageImageWriter page_images_;
  std::optional<DeltaWriter> writer_;  // once the tree is known
  std::map<uint32_t, Pid> pids_;       // virtual to ours; filled at the first Open
  std::map<uint32_t, RoutedTask> tasks_;
  size_t cursor_ = 0;  // VMA of the open task where the last page was
  struct FirstPage {
    criu::PageStreamId id;
    Vaddr at;
    uint32_t flags;
    std::vector<std::byte> data;
  };
  std::vector<FirstPage> first_pages_;
  bool must_be_remapped_ = false;
  bool ill_frozen_ = false;
  bool finished_ = false;
  std::optional<LayerInfo> layer_;
  std::optional<Error> first_error_;
  Bytes received_;
  Nanos told_at_;
};

}  // namespace unmoor
