// The worker: one process of ours for each address space being remapped. It plans, the helper it
// put into the program does; it is the Carrier of the batch state machine for programs from
// outside.
//
//   Begin: stop the program, inject the helper, register the direct-mapped VMAs with userfaultfd
//   (so
//          that MADV_DONTNEED, munmap, mremap and fork are known before they take effect), let it
//          go
//   Run:   the remapper's loop, handling events between its steps
//   End:   the helper leaves, the program's traces of it are removed
//
// Single-threaded (ptrace demands it). Killed at any moment it leaves the program with right
// memory; the supervisor holds the userfaultfd too, so events then wait for the next worker, which
// Begins with that descriptor.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "agent/agent.h"
#include "agent/guard.h"
#include "agent/helper_link.h"
#include "agent/layer_check.h"
#include "agent/progress_file.h"
#include "agent/put_back.h"
#include "agent/vma_names.h"
#include "base/result.h"
#include "os/fd.h"
#include "os/memory_room.h"
#include "os/procfs.h"
#include "os/ptrace.h"
#include "os/userfaultfd.h"
#include "remap/remapper.h"

namespace unmoor {

// Errnum EALREADY: somebody else watches the program, and we need not.
[[nodiscard]] Failure AnotherAtWork(Pid pid);

class Worker final : public Carrier {
 public:
  // Called with a forked child of the program and the userfaultfd that watches it.
  using OnFork = std::function<void(Pid child, Fd uffd)>;

  // What a worker leaves to the next one of its program.
  struct Legacy {
    std::unique_ptr<ProgramStop> stop;  // may still trace threads that were asleep
    RangeSet dropped;  // anonymous since the program gave it back: parts of their areas
    // What events told of and nobody has answered yet, since a thread did not stop.
    std::set<uint64_t> cuts;
    std::vector<VaddrRange> unreplaced;
  };
  Worker(Pid pid, const AgentOptions& options, OnFork on_fork, Legacy legacy = {});
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() override = default;

  // `old_uffd`: of an earlier worker or of the fork; may be empty. Leaves the program as it was,
  // running or stopped by SIGSTOP. False: nothing is direct-mapped and nothing was done, unless it
  // has to be `inside` all the same.
  [[nodiscard]] Result<bool> Begin(Fd old_uffd, bool inside = false);
  // The same for a program restored a moment ago: it is stopped by SIGSTOP and nobody has been
  // inside since, so what only another agent can have left is not looked for. What it is doing is
  // not in the progress file before Record().
  [[nodiscard]] Result<bool> BeginRestored();
  void Record() { SaveProgress(""); }
  // The flags of what it maps, which take long to read: before its first event is answered.
  void LearnFlags();
  [[nodiscard]] int uffd() const { return uffd_.get(); }
  // Remaps everything. Returns early without error when the program ends or calls exec.
  [[nodiscard]] Result<> Run();
  // Only keeps the program's memory behaving as anonymous, until `limit` has passed (negative: for
  // ever), the program has ended, or `stop()` says so.
  [[nodiscard]] Result<> Watch(Nanos limit, const std::function<bool()>& stop);
  [[nodiscard]] Result<> End();

  // Before Run: see put_back.h. An error leaves the program direct-mapped in part.
  [[nodiscard]] Result<> PutBack(const std::vector<ShownByLayer>& ranges);
  // Run and Watch end with errnum ECANCELED when it says so.
  void StopWhen(std::function<bool()> asked) { asked_ = std::move(asked); }
  // Out of the program, which goes on being watched: its events wait. What was not swapped yet is
  // to be copied anew. Whether or not it succeeds another Worker goes on with what this one had.
  [[nodiscard]] Result<> StepAside();
  [[nodiscard]] Fd TakeUffd() { return std::move(uffd_.valid() ? uffd_ : old_uffd_); }
  [[nodiscard]] Legacy TakeLegacy() {
    return {std::move(stop_owner_), std::move(dropped_), std::move(cuts_), std::move(unreplaced_)};
  }

  [[nodiscard]] bool AnotherAgentIsAtWork() const;
  [[nodiscard]] bool program_ended() const;
  [[nodiscard]] RemapReport report() const;

  // Carrier
  Result<std::vector<PlannedArea>> Plan() override;
  Result<bool> HandleEvents() override;
  const RangeSet& dropped() const override { return dropped_; }
  Result<std::vector<VaddrRange>> OwnPages(VaddrRange range, bool written_only) override;
  Result<> Copy(size_t area, std::span<const CopyStep> steps) override;
  Result<> CopyAgain(size_t area, std::span<const VaddrRange> pages) override;
  Result<SwapOutcome> Swap(std::span<const Piece> pieces, PageCount dirty_limit) override;
  void Pause(Nanos time) override;

 private:
  static constexpr Nanos kFirstHold{5'000'000};
  struct Mirror {
    Area area;
    Vaddr base;  // of area.range.begin
    [[nodiscard]] Vaddr At(Vaddr original) const { return base + (original - area.range.begin); }
  };
  using FileId = std::pair<uint64_t, uint64_t>;  // device, inode
  struct ImageFile {
    Fd fd;
    int helper_fd = -1;
    LayerCheck check;
  };

  struct MovedMemory {
    VaddrRange from;
    Vaddr to;
  };
  struct HeldEvents {
    std::vector<VaddrRange> given_back;
    std::vector<Vaddr> cut;                // where a munmap may have shortened a VMA
    std::vector<VaddrRange> grown;         // what moved VMAs gained while they moved
    std::vector<MovedMemory> unexplained;  // by a call not seen yet
  };

  [[nodiscard]] Result<> RepeatWhileBusy(
      const std::function<Result<>(Nanos stop_limit)>& action) const;
  [[nodiscard]] Result<> Identify();
  [[nodiscard]] Result<> StopAndInject(Nanos stop_limit);
  [[nodiscard]] Result<bool> StopAndInjectRestored(Nanos stop_limit);
  [[nodiscard]] Result<bool> DrainOldEvents();
  [[nodiscard]] Result<> OverwriteImage(VaddrRange range) const;
  [[nodiscard]] Result<> WriteZeros(VaddrRange range) const;  // whatever its protection
  [[nodiscard]] Result<> ReplaceStopped();
  void KeepAnswers();
  [[nodiscard]] Result<> FindCuts();
  [[nodiscard]] Result<> InjectStopped(std::span<const VmaInfo> vmas);
  [[nodiscard]] Result<> RemoveTraces(Nanos stop_limit);
  [[nodiscard]] Result<> RemoveTracesStopped();
  [[nodiscard]] Result<PlannedArea> PlanArea(Area area);
  [[nodiscard]] static Result<PlannedArea> PlanData(Area area, int file);
  [[nodiscard]] Result<> RefuseLost(const PlannedArea& planned);
  [[nodiscard]] Result<bool> ShowsImage(VaddrRange range) const;
  void Refuse(const Area& area, const LayerCheck::Damage& damage);
  [[nodiscard]] Result<> DamageLeft() const;
  [[nodiscard]] Result<> BeginPutBack(const ShownByLayer& shown, const VmaInfo& vma);
  [[nodiscard]] Result<> MapLayer(const Area& area, Vaddr base, int file);
  [[nodiscard]] Result<> PutBackArea(Pacer& pacer);
  [[nodiscard]] Result<> PutBackBatch(VaddrRange batch, Pacer& pacer);
  [[nodiscard]] Result<std::optional<Bytes>> CompareBlock(VaddrRange block, const RangeSet& own,
                                                          Bytes most);
  [[nodiscard]] Result<> ExchangePieces(std::span<const Piece> pieces, Pacer& pacer);
  [[nodiscard]] Result<> EndPutBack();
  [[nodiscard]] Result<> KnowChildren();
  [[nodiscard]] Result<> StopAndRead(HeldEvents& events, bool& changed);
  static void Collect(const UffdEvent& event, const ThreadCalls& calls, HeldEvents& events);
  static void NoteMove(const MovedMemory& moved, const BlockedCall& call, HeldEvents& events);
  [[nodiscard]] Result<> ExplainMoves(HeldEvents& events);
  [[nodiscard]] Result<helper::Reply> RunSwaps(const OpList& ops);
  [[nodiscard]] Result<> WaitForEarlierHelpers() const;
  [[nodiscard]] Result<> OpenTrackers(OpList& first);
  [[nodiscard]] Result<Fd> TakeUffd(int64_t made, int& helper_fd);
  [[nodiscard]] bool LeftAddressSpace() const;
  [[nodiscard]] Result<std::vector<PlannedArea>> PlanOnce();
  void RememberImages(std::span<const VmaInfo> vmas);
  [[nodiscard]] Result<> RegisterAreas(std::span<const VmaInfo> vmas);
  [[nodiscard]] Result<const Mirror*> MirrorFor(const Area& area);
  [[nodiscard]] const Mirror& MirrorOf(size_t area) const;
  [[nodiscard]] Result<ImageFile*> FileOf(const Area& area);
  [[nodiscard]] Result<ImageFile*> FileOf(const VmaInfo& vma);
  [[nodiscard]] Result<Vaddr> MapOwned(Bytes length, uint64_t congruent_to, bool no_reserve);
  [[nodiscard]] Result<> RecordOwned(size_t slot);
  [[nodiscard]] Result<> FreeMirrors();
  [[nodiscard]] Result<> ReleaseMirror(const Mirror& mirror);
  [[nodiscard]] Result<> AddName(OpList& ops, VaddrRange range, const std::string& name) const;
  [[nodiscard]] Result<> TakeMemory(std::span<const CopyStep> steps);
  [[nodiscard]] Result<> CopySteps(size_t area, std::span<const CopyStep> steps);
  [[nodiscard]] Result<> CheckSteps(const Area& area, LayerCheck& check,
                                    std::span<const CopyStep> steps);
  [[nodiscard]] Result<> EnsureScratch();
  [[nodiscard]] Result<> RunCopies(const OpList& ops, const std::function<void()>& meanwhile = {});
  void AddHugeBlock(OpList& ops, const Area& area, const Mirror& mirror, int file,
                    const CopyStep& step) const;
  void AddPages(OpList& ops, const Area& area, const Mirror& mirror, int file,
                const BlockContent& content) const;
  void AddOwnPages(OpList& ops, const Area& area, Vaddr to, VaddrRange pages) const;
  [[nodiscard]] Result<bool> AddChecks(OpList& ops, const Piece& piece) const;
  void AddSwap(OpList& ops, const Piece& piece) const;
  [[nodiscard]] bool AddGuards(OpList& ops, std::span<const Piece> pieces);

  [[nodiscard]] Result<> HandleEventsStopped(bool& changed);
  [[nodiscard]] Result<> Settle();
  // Whether the program has run for long enough since it was held.
  [[nodiscard]] bool MayHold() const;
  [[nodiscard]] Result<> HoldProgram(bool& changed);
  [[nodiscard]] Result<> ReleaseProgram();
  [[nodiscard]] Result<> DropWhatIsGivenBack(const ThreadCalls& calls);
  [[nodiscard]] Result<SwapOutcome> SwapInWindow(std::span<const Piece> pieces,
                                                 PageCount dirty_limit);
  void NoteEvent(UffdEvent& event, const ThreadCalls& calls, bool& changed);
  [[nodiscard]] bool MayCopyGivenBack(VaddrRange range) const;
  [[nodiscard]] Result<> Drop(VaddrRange range);
  [[nodiscard]] Result<> ZeroGrowth(VaddrRange grown);
  [[nodiscard]] Result<> ZeroUnreplaced(std::span<const VaddrRange> given_back);
  [[nodiscard]] Result<> ZeroShown(const VmaInfo& vma, VaddrRange range);
  [[nodiscard]] Result<> ConvertCuts();
  [[nodiscard]] Result<> ConvertShortened(Vaddr end);
  [[nodiscard]] Result<> ConvertHeld(size_t area);
  [[nodiscard]] Result<> ConvertHot();
  [[nodiscard]] Result<> ConvertSmallest();
  [[nodiscard]] Result<> DropImagePart(VaddrRange part, int prot);
  void FindForkedChild(Fd uffd, const ThreadCalls& calls);
  [[nodiscard]] bool IsForked(Pid child) const;
  [[nodiscard]] bool IsKnownImage(const VmaInfo& vma) const;
  [[nodiscard]] Result<> CheckNoPinnedMemory();
  void SaveProgress(const std::string& problem, bool never = false);

  Pid pid_;
  Pid supervisor_;
  std::unique_ptr<ProgramStop> stop_owner_;
  ProgramStop& stop_;
  AgentOptions options_;
  OnFork on_fork_;
  std::function<bool()> asked_;
  uint64_t start_time_ = 0;
  std::string name_;
  bool nested_ = false;               // in a PID namespace below ours
  std::optional<Nanos> remap_began_;  // not the watch before it
  Fd pidfd_;
  Fd pagemap_;
  Fd maps_;
  Fd memory_;
  Fd tasks_;
  int helper_pagemap_ = -1, helper_maps_ = -1, helper_memory_ = -1, helper_tasks_ = -1;
  HelperLink link_;
  Guard guard_;
  Fd old_uffd_;            // held until ours watches
  HeldEvents old_events_;  // read from it, with nobody inside yet to answer them
  Fd uffd_;                // events and write tracking
  int helper_uffd_ = -1;
  Fd staging_;  // UFFDIO_MOVE into mirrors
  int helper_staging_ = -1;
  bool can_move_ = false;
  Vaddr scratch_;
  std::vector<VaddrRange> owned_;
  std::map<FileId, ImageFile> files_;
  std::vector<VmaInfo> images_;  // the VMAs that map images, as last read, with their flags
  VmaNames names_;               // of what these map, where the kernel has names
  std::vector<Mirror> mirrors_;
  MemoryRoom memory_room_;  // the program's
  std::vector<PlannedArea> areas_;
  RangeSet dropped_;
  std::vector<VaddrRange> unreplaced_;  // given back, with no mapping to spare for it
  RangeSet refused_;                    // damaged in the image: stays direct-mapped
  std::string damage_;                  // the first of it
  size_t refusals_ = 0;
  Bytes verified_;
  RangeSet touched_;  // by events since the baseline of the batch being put back
  // While an area is put back it is areas_[0].
  std::optional<Mirror> put_back_mirror_;  // not among mirrors_: it maps the layer
  Fd put_back_file_;
  Nanos put_back_patience_ = {};
  std::vector<std::byte> put_back_bytes_[2];
  std::set<uint64_t> cuts_;  // where VMAs may have been shortened, not looked at yet
  Bytes dropped_bytes_;
  Bytes converted_;  // swapped while the program was held, without the remapper
  std::set<int> known_children_;
  bool stale_ = false;
  int busy_in_a_row_ = 0;
  int plans_in_a_row_ = 0;  // with nothing swapped between them
  Nanos hold_limit_ = kFirstHold;
  Nanos held_since_;
  Nanos next_hold_;
  Nanos longest_hold_;
  bool held_in_vain_ = false;
  bool unsettled_ = false;  // an event was read whose thread may still have to empty its pages
  bool swap_next_ = false;  // the next hold is for a swap
  RemapCounts counts_;
  Nanos last_saved_;
  Nanos next_pin_check_;
  bool direct_io_ = false;  // the program has files open with O_DIRECT
};

// Does once what every worker does in its first moments, for a worker that waits for its program:
// code and memory for it are then at hand.
void WarmUpWorker();

}  // namespace unmoor
