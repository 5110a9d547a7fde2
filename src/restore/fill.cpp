// See fill.h.
#include "restore/fill.h"

#include <algorithm>
#include <list>
#include <map>
#include <mutex>
#include <string>

#include "base/fault_point.h"
#include "image/layout.h"
#include "image/verified_pages.h"
#include "os/file.h"
#include "os/memory_room.h"
#include "os/process_control.h"
#include "os/remote_memory.h"

namespace unmoor {
namespace {

constexpr uint64_t kPieceSize = uint64_t{16} << 20;  // what a thread takes at once
// Made huge at once: each time the kernel waits for every processor to empty its lists of pages.
constexpr uint64_t kHugeAtOnce = 8 * kPieceSize;

// The tasks of one set of control groups, and what may be used there.
struct Group {
  explicit Group(Pid pid) : room(pid) {}
  MemoryRoom room;
  Bytes wanted;
};

struct Task {
  MemoryOfStopped memory;
  const FillTask* plan = nullptr;
  Group* group = nullptr;
};

// Blocks to be made huge before the first of their pieces is filled.
struct HugeBlocks {
  std::once_flag made;
  std::vector<Vaddr> blocks;
};

// Pages of one area, within kPieceSize of addresses.
struct Piece {
  const Task* task = nullptr;
  const FillArea* area = nullptr;
  std::vector<OverlayRun> runs;
  Bytes size;
  HugeBlocks* huge = nullptr;
};

OverlayRun Part(const OverlayRun& run, VaddrRange range) {
  return {range, run.layer, run.offset + (range.begin - run.range.begin)};
}

void AddPieces(const Task& task, const FillArea& area, std::vector<Piece>& pieces) {
  uint64_t last = ~uint64_t{0};
  for (const OverlayRun& run : area.pages) {
    for (Vaddr at = run.range.begin; at < run.range.end;) {
      const uint64_t number = at.value / kPieceSize;
      const VaddrRange range{at, std::min(run.range.end, Vaddr((number + 1) * kPieceSize))};
      if (number != last) pieces.push_back({&task, &area, {}, {}, nullptr});
      last = number;
      pieces.back().runs.push_back(Part(run, range));
      pieces.back().size += range.size();
      at = range.end;
    }
  }
}

// Those blocks of 2 MiB that have all of their pages in the piece.
std::vector<Vaddr> FullBlocks(const Piece& piece) {
  std::vector<Vaddr> blocks;
  uint64_t block = 0;
  uint64_t has = 0;
  for (const OverlayRun& run : piece.runs) {
    for (uint64_t at = run.range.begin.value; at < run.range.end.value;) {
      const uint64_t begin = AlignDown(at, kHugePageSize);
      const uint64_t end = std::min(run.range.end.value, begin + kHugePageSize);
      if (begin != block) has = 0;
      block = begin;
      has += end - at;
      if (has == kHugePageSize) blocks.push_back(Vaddr(block));
      at = end;
    }
  }
  return blocks;
}

class Filler {
 public:
  Filler(const LayerSources& layers, const FillOptions& options)
      : layers_(layers), options_(options) {}

  [[nodiscard]] Result<> Run(std::span<const FillTarget> targets) {
    UNMOOR_TRY(Prepare(targets));
    Crew crew(pieces_.size());
    return crew.Run(options_.threads, options_.look, [this](Crew& own) { return Work(own); });
  }

 private:
  [[nodiscard]] Result<> Prepare(std::span<const FillTarget> targets) {
    for (const FillTarget& target : targets) {
      if (target.task->areas.empty()) continue;
      UNMOOR_ASSIGN(MemoryOfStopped memory, MemoryOfStopped::Open(target.pid));
      tasks_.push_back({std::move(memory), target.task, &GroupOf(target.pid)});
      const Task& task = tasks_.back();
      task.group->wanted += target.task->size;
      for (const FillArea& area : target.task->areas) AddPieces(task, area, pieces_);
    }
    if (options_.huge) PlanHugeBlocks();
    for (auto& [name, group] : groups_) {
      group.room.FindGroups();
      UNMOOR_TRY(group.room.CanTake(group.wanted));
    }
    return {};
  }

  void PlanHugeBlocks() {
    const Piece* last = nullptr;
    for (Piece& piece : pieces_) {
      if (!piece.area->writable || !piece.area->may_be_huge) continue;
      const auto number = [](const Piece& of) {
        return of.runs.front().range.begin.value / kHugeAtOnce;
      };
      const bool follows = last != nullptr && last->task == piece.task &&
                           last->area == piece.area && number(*last) == number(piece);
      piece.huge = follows ? last->huge : &huge_.emplace_back();
      for (const Vaddr block : FullBlocks(piece)) piece.huge->blocks.push_back(block);
      last = &piece;
    }
  }

  [[nodiscard]] Group& GroupOf(Pid pid) {
    const auto memberships = ReadFile(fmt::format("/proc/{}/cgroup", pid.value));
    return groups_.try_emplace(memberships.value_or(std::string()), pid).first->second;
  }

  [[nodiscard]] Result<> Work(Crew& crew) const {
    TakeShortTurns(false);
    VerifiedPages source(layers_);
    while (const auto number = crew.Next()) {
      const Piece& piece = pieces_[*number];
      UNMOOR_TRY(FaultPoint("fill.piece"));
      UNMOOR_TRY(piece.task->group->room.Take(piece.size));
      if (piece.huge != nullptr) {
        std::call_once(piece.huge->made, [&] { piece.task->memory.MakeHuge(piece.huge->blocks); });
      }
      for (const OverlayRun& run : piece.runs) UNMOOR_TRY(FillRun(piece, run, source));
      crew.Done(piece.size.value);
    }
    return {};
  }

  [[nodiscard]] static Result<> FillRun(const Piece& piece, const OverlayRun& run,
                                        VerifiedPages& source) {
    const FileOffset end = run.offset + run.range.size();
    for (Vaddr at = run.range.begin; at < run.range.end;) {
      const auto pages = source.At(run.layer, {run.offset + (at - run.range.begin), end});
      if (!pages) {
        return Failure(Error(pages.error().kind(), pages.error().errnum(),
                             fmt::format("{}; task {} ({}) has this at {}", pages.error().message(),
                                         piece.task->plan->vpid, piece.task->plan->name, at)));
      }
      UNMOOR_TRY(piece.task->memory.Write(at, *pages, piece.area->writable));
      at = at + Bytes(pages->size());
    }
    return {};
  }

  const LayerSources& layers_;
  const FillOptions& options_;
  std::map<std::string, Group> groups_;  // by /proc/PID/cgroup
  std::list<Task> tasks_;
  std::vector<Piece> pieces_;
  std::list<HugeBlocks> huge_;
};

}  // namespace

Result<> Fill(std::span<const FillTarget> targets, const LayerSources& layers,
              const FillOptions& options) {
  return Filler(layers, options).Run(targets);
}

}  // namespace unmoor
