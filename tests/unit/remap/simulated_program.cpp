// See simulated_program.h.
#include "simulated_program.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>

namespace unmoor::simulation {

std::string ToString(const Action& a) {
  constexpr const char* kNames[] = {"write", "give back", "unmap", "map over", "protect", "move"};
  std::string text = fmt::format("thread {}: {} {}-{}", a.thread,
                                 kNames[static_cast<size_t>(a.kind)], a.pages.begin, a.pages.end);
  if (a.kind == Action::Kind::kMove) text += fmt::format(" to {}", a.to);
  if (a.late != 0) text += fmt::format(" ({} late)", a.late);
  return text;
}

void Program::MapImage(PageRange range, uint64_t file_page) {
  for (uint64_t page = range.begin; page < range.end; ++page, ++file_page) {
    pages_[page] = {.image = true, .file_page = file_page, .own = {}, .watched = true};
    reference_[page] = {ImagePage(file_page), false};
  }
}

uint64_t Program::ImagePage(uint64_t file_page) const {
  return file_page < image_.size() ? image_[file_page] : 0;
}

uint64_t Program::View(const Page& page) const {
  if (page.own) return *page.own;
  return page.image ? ImagePage(page.file_page) : 0;
}

bool Program::AllMapped(PageRange range) const {
  for (uint64_t page = range.begin; page < range.end; ++page) {
    if (!pages_.contains(page)) return false;
  }
  return true;
}

bool Program::AnyWatched(PageRange range) const {
  return std::any_of(pages_.lower_bound(range.begin), pages_.lower_bound(range.end),
                     [](const auto& entry) { return entry.second.watched; });
}

bool Program::MapsImage() const {
  return std::ranges::any_of(pages_, [](const auto& entry) { return entry.second.image; });
}

Program::Outcome Program::Do(const Action& action) {
  using Kind = Action::Kind;
  for (const Call& call : calls_) {
    if (call.action.thread == action.thread) return Outcome::kBlocked;
    if (call.action.kind == Kind::kGiveBack && call.action.pages.Overlaps(action.pages)) {
      return Outcome::kBlocked;
    }
  }
  if (!AllMapped(action.pages)) return Outcome::kImpossible;
  Page& first = pages_[action.pages.begin];
  switch (action.kind) {
    case Kind::kWrite:
      if (first.read_only) return Outcome::kImpossible;
      first.own = reference_[action.pages.begin].value = ++next_value_;
      first.written = true;
      return Outcome::kDone;
    case Kind::kProtect: {
      const bool read_only = !first.read_only;
      for (uint64_t p = action.pages.begin; p < action.pages.end; ++p) {
        pages_[p].read_only = reference_[p].read_only = read_only;
      }
      return Outcome::kDone;
    }
    default:
      break;
  }
  const bool watched = AnyWatched(action.pages);
  if (action.kind == Kind::kMove) {
    const PageRange target{action.to, action.to + (action.pages.end - action.pages.begin)};
    if (pages_.lower_bound(target.begin) != pages_.lower_bound(target.end))
      return Outcome::kImpossible;
    Move(action.pages, action.to);
  }
  if (action.kind == Kind::kUnmap || action.kind == Kind::kMapOver) Unmap(action.pages);
  if (action.kind == Kind::kMapOver) {
    for (uint64_t p = action.pages.begin; p < action.pages.end; ++p) {
      pages_[p] = Page{};
      reference_[p] = {};
    }
  }
  if (watched) {
    events_.push_back({action.kind, action.pages, action.thread});
    calls_.push_back({action, true, action.late});
  } else if (action.kind == Kind::kGiveBack) {
    GiveBack(action.pages);
  }
  return Outcome::kDone;
}

void Program::GiveBack(PageRange range) {
  for (uint64_t p = range.begin; p < range.end; ++p) {
    pages_[p].own.reset();
    pages_[p].written = false;
    reference_[p].value = 0;
  }
}

void Program::Unmap(PageRange range) {
  pages_.erase(pages_.lower_bound(range.begin), pages_.lower_bound(range.end));
  reference_.erase(reference_.lower_bound(range.begin), reference_.lower_bound(range.end));
}

void Program::Move(PageRange range, uint64_t to) {
  for (uint64_t p = range.begin; p < range.end; ++p) {
    Page page = pages_[p];
    page.written = page.own.has_value();  // moving loses the baseline
    pages_[to + (p - range.begin)] = page;
    reference_[to + (p - range.begin)] = reference_[p];
  }
  Unmap(range);
}

Event Program::ReadEvent() {
  const Event event = events_.front();
  events_.pop_front();
  for (Call& call : calls_) {
    if (call.action.thread == event.thread) call.waits = false;
  }
  return event;
}

void Program::Step() {
  std::erase_if(calls_, [&](Call& call) {
    if (call.waits || call.late-- > 0) return false;
    if (call.action.kind == Action::Kind::kGiveBack) GiveBack(call.action.pages);
    return true;
  });
}

void Program::StopThreads() {
  for (Call& call : calls_) call.late = 0;
  Step();
}

void Program::Compare() {
  if (!violation_.empty()) return;
  for (const auto& [number, expected] : reference_) {
    const bool between = std::ranges::any_of(calls_, [page = number](const Call& call) {
      return call.action.kind == Action::Kind::kGiveBack && call.action.pages.Contains(page);
    });
    if (between) continue;
    const auto it = pages_.find(number);
    if (it == pages_.end()) {
      violation_ = fmt::format("page {} is no longer mapped", number);
    } else if (View(it->second) != expected.value) {
      violation_ =
          fmt::format("page {} reads {} instead of {}", number, View(it->second), expected.value);
    } else if (it->second.read_only != expected.read_only) {
      violation_ = fmt::format("page {} has another protection than it should", number);
    }
  }
  if (pages_.size() != reference_.size()) violation_ = "a page is mapped that should not be";
}

std::vector<VmaInfo> Program::Vmas() const {
  std::vector<VmaInfo> vmas;
  const Page* last = nullptr;
  for (const auto& [number, page] : pages_) {
    const Vaddr at(number * kPageSize);
    const bool joins = last != nullptr && vmas.back().range.end == at &&
                       last->image == page.image && last->watched == page.watched &&
                       last->read_only == page.read_only &&
                       (!page.image || last->file_page + 1 == page.file_page);
    last = &page;
    if (joins) {
      vmas.back().range.end = at + Bytes(kPageSize);
      continue;
    }
    VmaInfo vma;
    vma.range = {at, at + Bytes(kPageSize)};
    vma.prot = page.read_only ? PROT_READ : PROT_READ | PROT_WRITE;
    if (page.image) {
      vma.inode = 1;
      vma.offset = FileOffset(page.file_page * kPageSize);
    }
    vmas.push_back(vma);
  }
  return vmas;
}

}  // namespace unmoor::simulation
