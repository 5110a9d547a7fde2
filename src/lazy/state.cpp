// See state.h.
#include "lazy/state.h"

#include <algorithm>

namespace unmoor {

void LazyState::Apply(const LazyRecord& record) {
  using Kind = LazyRecord::Kind;
  Space* const space = FindSpace(record.kind == Kind::kForked ? record.parent_uffd : record.uffd);
  switch (record.kind) {
    case Kind::kCriu:
      criu_ = Pid{record.pid};
      break;
    case Kind::kTask:
      spaces_.push_back({MemoryOf(record.uffd, record.vpid), record.vpid});
      break;
    case Kind::kAdopted:
      adopted_.push_back({Pid{record.pid}, record.vpid, record.stay_stopped != 0});
      break;
    case Kind::kRunning:
      running_ = true;
      break;
    case Kind::kForked:
      if (space != nullptr) {
        spaces_.push_back({space->memory.Forked(record.uffd), space->vpid, true});
      }
      break;
    case Kind::kGivenBack:
      if (space != nullptr) space->memory.GivenBack(record.range);
      break;
    case Kind::kMoved:
      if (space != nullptr) space->memory.Moved(record.range, record.to);
      break;
    case Kind::kClosed:
      spaces_.remove_if([&](const Space& one) { return &one == space; });
      break;
    case Kind::kFinished:
      finished_ = true;
      break;
  }
}

const LazyState::Adopted* LazyState::FindAdopted(uint32_t vpid) const {
  const auto found = std::ranges::find(adopted_, vpid, &Adopted::vpid);
  return found == adopted_.end() ? nullptr : &*found;
}

LazyState::Space* LazyState::FindSpace(int uffd) {
  const auto found =
      std::ranges::find_if(spaces_, [&](const Space& one) { return one.memory.uffd() == uffd; });
  return found == spaces_.end() ? nullptr : &*found;
}

AddressSpace LazyState::MemoryOf(int uffd, uint32_t vpid) const {
  const auto found = std::ranges::find(image_.tasks, vpid, &LazyTask::vpid);
  if (found == image_.tasks.end()) return AddressSpace(uffd, PagesToCome());
  return AddressSpace(uffd, PagesToCome(found->pages), found->first);
}

}  // namespace unmoor
