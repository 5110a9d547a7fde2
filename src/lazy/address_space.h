// AddressSpace: one restored (or forked) address space whose pages are brought through its
// userfaultfd.
//
// A page goes into place once; whatever is there already stays. Where the kernel says that the
// space is changing, nothing is concluded: the event has to be read first (Changed, by the owner).
// A block that is damaged is set aside, so that all others come; touching it is an error.
// What was read together with a page somebody waited for (a packed layer's frame) comes with it: to
// read it once more costs more than to have others wait while it is placed.
// One thread. The descriptor is the owner's.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "lazy/pages_to_come.h"
#include "lazy/verified_blocks.h"

namespace unmoor {

class AddressSpace {
 public:
  enum class Step {
    kDone,  // one step was made, or there is none to make
    kWait,  // not now: events have to be read, or memory is short
    kGone,  // the address space has ended
  };

  // `first`: what is to be brought before all else, in that order.
  AddressSpace(int uffd, PagesToCome pages, std::vector<VaddrRange> first = {})
      : uffd_(uffd), pages_(std::move(pages)), first_(std::move(first)), total_(pages_.left()) {}
  // The same for a child born just now.
  [[nodiscard]] AddressSpace Forked(int uffd) const;

  [[nodiscard]] int uffd() const { return uffd_; }
  // What the program did.
  void GivenBack(VaddrRange range);
  void Moved(VaddrRange from, Vaddr to);
  void Waits(VaddrRange page) { waiting_.push_back(page); }

  // Brings the pages somebody waits for, and those around them. An error: one is damaged.
  [[nodiscard]] Result<Step> ServeWaiting(VerifiedBlocks& source);
  // Brings the next block.
  [[nodiscard]] Result<Step> BringNext(VerifiedBlocks& source);
  // Those that it will need, as far as can be told now.
  [[nodiscard]] std::vector<BlockName> Upcoming(size_t count) const;

  [[nodiscard]] bool somebody_waits() const { return !waiting_.empty(); }
  [[nodiscard]] bool has_first() const { return cursor_.first < first_.size(); }
  // Nothing is left to bring but what is damaged.
  [[nodiscard]] bool brought() const { return pages_.empty(); }
  [[nodiscard]] bool complete() const { return pages_.empty() && damaged_.empty(); }
  // What is wrong, if anything is: memory is short, or a block damaged.
  [[nodiscard]] std::string problem() const;

  [[nodiscard]] Bytes total() const { return total_; }
  [[nodiscard]] Bytes come() const { return come_; }
  [[nodiscard]] Bytes given_back() const { return given_back_; }

 private:
  // How far all has been brought.
  struct Cursor {
    size_t first = 0;  // in first_,
    Vaddr in_first;    // and from there on
    Vaddr next;        // by address
  };

  // The next run to bring the block of; `cursor` is behind that then.
  [[nodiscard]] std::optional<OverlayRun> Next(Cursor& cursor) const;
  [[nodiscard]] Result<Step> Serve(VaddrRange page, VerifiedBlocks& source);
  // What is to come from the piece of the layer that `run` begins in.
  [[nodiscard]] Result<Step> PlacePiece(const OverlayRun& run, VerifiedBlocks& source);
  [[nodiscard]] Result<Step> PlaceBlock(const OverlayRun& run, std::span<const std::byte> block);
  [[nodiscard]] Result<Step> Place(VaddrRange range, std::span<const std::byte> pages);
  Bytes Take(VaddrRange range);
  void SetAside(const OverlayRun& run);

  int uffd_;
  PagesToCome pages_;
  PagesToCome damaged_;
  std::vector<VaddrRange> waiting_;
  std::vector<VaddrRange> first_;
  Cursor cursor_;
  std::string damage_;  // of a block set aside
  bool out_of_memory_ = false;
  Bytes total_;
  Bytes come_;
  Bytes given_back_;
};

}  // namespace unmoor
