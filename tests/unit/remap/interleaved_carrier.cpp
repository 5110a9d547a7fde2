// See interleaved_carrier.h.
#include "interleaved_carrier.h"

#include <sys/mman.h>

namespace unmoor::interleaving {
namespace {

constexpr uint64_t kFirstPage = 511;  // the second page lies in another block

VaddrRange AddressesOf(int page) {
  const Vaddr at((kFirstPage + static_cast<uint64_t>(page)) * kPageSize);
  return {at, at + Bytes(kPageSize)};
}

template <class Callback>
void ForEachPage(VaddrRange range, Callback callback) {
  for (Vaddr at = range.begin; at < range.end; at = at + Bytes(kPageSize)) {
    callback(static_cast<int>(at.value / kPageSize - kFirstPage));
  }
}

}  // namespace

Result<std::vector<Carrier::PlannedArea>> InterleavedCarrier::Plan() {
  machine_.Step("plans");
  std::vector<VmaInfo> vmas;
  for (int i = 0; i < machine_.page_count(); ++i) {
    const Machine::Page& page = machine_.page(i);
    const VaddrRange range = AddressesOf(i);
    machine_.Observe(page.image);
    const bool image = page.image;
    const bool joins =
        !vmas.empty() && vmas.back().range.end == range.begin && (vmas.back().inode != 0) == image;
    if (joins) {
      vmas.back().range.end = range.end;
      continue;
    }
    VmaInfo vma;
    vma.range = range;
    vma.prot = PROT_READ | PROT_WRITE;
    if (image) {
      vma.inode = 1;
      vma.offset = FileOffset(static_cast<uint64_t>(i) * kPageSize);
    }
    vmas.push_back(vma);
  }
  std::vector<PlannedArea> areas;
  for (Area& area : FindAreas(vmas, [](const VmaInfo& vma) { return vma.inode != 0; }, dropped_)) {
    PlannedArea planned{area, {}};
    ForEachPage(area.range, [&](int page) {
      if (machine_.scenario().image[static_cast<size_t>(page)] != 0) {
        planned.image_data.Insert(AddressesOf(page));
      }
    });
    areas.push_back(std::move(planned));
  }
  return areas;
}

Result<bool> InterleavedCarrier::HandleEvents() {
  machine_.Step("looks for events");
  while (machine_.HasEvent()) {
    const int page = machine_.EventPage();
    machine_.Observe(static_cast<uint64_t>(page) + 1);
    if (!Has(Mutation::kGivingBackNotAnswered)) {
      machine_.Drop(page);
      machine_.mirror[static_cast<size_t>(page)] = -1;
      machine_.dropped[static_cast<size_t>(page)] = true;
      dropped_.Insert(AddressesOf(page));
      machine_.Step("has dropped what was given back");
    }
    machine_.ReadEvent();
    machine_.Step("has read the event");
  }
  machine_.Observe(0);
  return false;
}

Result<std::vector<VaddrRange>> InterleavedCarrier::OwnPages(VaddrRange range, bool written_only) {
  std::vector<VaddrRange> found;
  ForEachPage(range, [&](int number) {
    machine_.Step(written_only ? "looks for a written page" : "looks for an own page");
    Machine::Page& page = machine_.page(number);
    const bool hit = page.own && (!written_only || page.written);
    machine_.Observe(hit);
    if (!hit) return;
    page.written = false;
    found.push_back(AddressesOf(number));
  });
  return found;
}

void InterleavedCarrier::CopyPage(int page) {
  machine_.Step("copies a page");
  machine_.mirror[static_cast<size_t>(page)] = machine_.View(page);
}

Result<> InterleavedCarrier::Copy(size_t /*area*/, std::span<const CopyStep> steps) {
  for (const CopyStep& step : steps) {
    ForEachPage(step.block, [&](int page) { machine_.mirror[static_cast<size_t>(page)] = -1; });
    for (const VaddrRange range : step.content.image) {
      ForEachPage(range, [&](int page) {
        machine_.mirror[static_cast<size_t>(page)] =
            machine_.scenario().image[static_cast<size_t>(page)];
      });
    }
    for (const VaddrRange range : step.content.own) {
      ForEachPage(range, [&](int page) { CopyPage(page); });
    }
  }
  return {};
}

Result<> InterleavedCarrier::CopyAgain(size_t /*area*/, std::span<const VaddrRange> pages) {
  for (const VaddrRange range : pages) ForEachPage(range, [&](int page) { CopyPage(page); });
  return {};
}

Result<SwapOutcome> InterleavedCarrier::Swap(std::span<const Piece> pieces, PageCount /*limit*/) {
  SwapOutcome outcome;
  outcome.pause = Nanos(700'000);  // neither grows nor shrinks the batches
  outcome.result = machine_.scenario().fault_guard ? SwapGuarded(pieces) : SwapFrozen(pieces);
  machine_.Observe(static_cast<uint64_t>(outcome.result));
  if (outcome.result == SwapResult::kSwapped) {
    for (const Piece& piece : pieces) dropped_.Erase(piece.range);
  }
  return outcome;
}

// True when every thread is in the handler; false when one is not waited for any longer.
bool InterleavedCarrier::StopAllThreads() {
  for (;;) {
    const bool more = machine_.SignalNewThreads();
    machine_.Step("has sent signals");
    if (!machine_.WaitUntil([&] { return machine_.AllStopped(); })) {
      return false;
    }
    if (!more || Has(Mutation::kThreadsListedOnce)) return true;
  }
}

SwapResult InterleavedCarrier::SwapFrozen(std::span<const Piece> pieces) {
  machine_.OpenWindow();
  const auto recheck = [&] {
    for (const Piece& piece : pieces) Recheck(piece);
  };
  if (Has(Mutation::kRecheckBeforeAllStopped)) {
    (void)machine_.SignalNewThreads();
    recheck();
  }
  const bool stopped = StopAllThreads();
  if (!stopped || machine_.HasEvent()) {
    machine_.CloseWindow();
    return SwapResult::kBusy;
  }
  if (machine_.ChooseTooDirty()) {
    machine_.CloseWindow();
    return SwapResult::kTooDirty;
  }
  if (!Has(Mutation::kRecheckBeforeAllStopped)) recheck();
  if (Has(Mutation::kUnguardBeforeSwap)) {
    machine_.CloseWindow();
    machine_.Step("has let the threads go");
  }
  for (const Piece& piece : pieces) SwapPiece(piece);
  machine_.Step("has swapped");
  machine_.CloseWindow();
  return SwapResult::kSwapped;
}

SwapResult InterleavedCarrier::SwapGuarded(std::span<const Piece> pieces) {
  if (!machine_.everybody_passed() && !LetEverybodyPass()) return SwapResult::kBusy;
  std::vector<Piece> unguardable;
  for (const Piece& piece : pieces) {
    if (!SwapUnderGuard(piece)) unguardable.push_back(piece);
  }
  return unguardable.empty() ? SwapResult::kSwapped : SwapFrozen(unguardable);
}

// A fork under way has copied the handlers already. It is over once its thread has been stopped.
bool InterleavedCarrier::LetEverybodyPass() {
  machine_.Step("installs the fault handler");
  machine_.InstallHandler();
  if (!Has(Mutation::kForksIgnored)) {
    machine_.OpenWindow();
    const bool stopped = StopAllThreads();
    machine_.CloseWindow();
    if (!stopped) return false;
  }
  machine_.EverybodyPassed();
  return true;
}

// False: a thread with SIGSEGV blocked may write there.
bool InterleavedCarrier::SwapUnderGuard(const Piece& piece) {
  if (Has(Mutation::kRecheckBeforeAllStopped)) Recheck(piece);
  machine_.Step("raises the guard");
  machine_.RaiseGuard();
  if (!Has(Mutation::kBlockersIgnored) &&
      !machine_.WaitUntil([&] { return !machine_.SomebodyBlocksFaults(); })) {
    machine_.LowerGuard();
    return false;
  }
  machine_.Step("guards a piece");
  ForEachPage(piece.range, [&](int page) { machine_.Guard(page); });
  if (!Has(Mutation::kRecheckBeforeAllStopped)) Recheck(piece);
  if (Has(Mutation::kUnguardBeforeSwap)) {
    machine_.Step("unguards");
    ForEachPage(piece.range, [&](int page) { machine_.Unguard(page); });
  }
  SwapPiece(piece);
  ForEachPage(piece.range, [&](int page) { machine_.Unguard(page); });
  machine_.LowerGuard();
  return true;
}

void InterleavedCarrier::Recheck(const Piece& piece) {
  if (Has(Mutation::kNoRecheck)) return;
  ForEachPage(piece.range, [&](int number) {
    machine_.Step("rechecks a page");
    const Machine::Page& page = machine_.page(number);
    int& copy = machine_.mirror[static_cast<size_t>(number)];
    // Write protection does not see what a device wrote to a page pinned since before the baseline.
    const bool compare = !Has(Mutation::kOwnPagesNotCompared);
    if (page.own && (page.written || (compare && copy != page.value))) copy = page.value;
  });
}

// One step: in a piece unregistered and not yet swapped, giving memory back would show the image
// (docs/guarantees.md names the moment, for a copier killed in it).
void InterleavedCarrier::SwapPiece(const Piece& piece) {
  machine_.Step("swaps a piece");
  ForEachPage(piece.range, [&](int page) {
    int& copy = machine_.mirror[static_cast<size_t>(page)];
    machine_.Replace(page, copy >= 0, static_cast<uint8_t>(std::max(copy, 0)));
    copy = -1;
    machine_.dropped[static_cast<size_t>(page)] = false;
  });
}

void InterleavedCarrier::Pause(Nanos /*time*/) {
  machine_.Step("pauses");
}

}  // namespace unmoor::interleaving
