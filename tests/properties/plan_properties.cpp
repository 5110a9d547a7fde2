// The remap plan against a model that knows each page: which VMAs make which areas, however the
// kernel happens to have split them, and what each page of a block is copied from.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <sys/mman.h>

#include <optional>

#include "generators.h"
#include "remap/plan.h"

namespace unmoor::properties {
namespace {

constexpr uint64_t kBase = 1000;  // first page of the address spaces below

// What the kernel and the program know of one page.
struct ModelPage {
  enum class Kind { kNothing, kImage, kDropped, kAnonymous, kOtherFile } kind = Kind::kNothing;
  int prot = PROT_READ | PROT_WRITE;
  bool huge_wish = false;   // madvise flag "hg"
  uint64_t file_shift = 0;  // kImage: file page = page number - kBase + file_shift
  uint64_t inode = 7;
  bool operator==(const ModelPage&) const = default;
};
using Model = std::vector<ModelPage>;

[[maybe_unused]] void showValue(const ModelPage& page, std::ostream& out) {
  out << "NIDAF"[static_cast<size_t>(page.kind)] << page.prot << (page.huge_wish ? "h" : "") << "+"
      << page.file_shift << "#" << page.inode;
}

// Runs of equal pages, as programs have them.
rc::Gen<Model> Models() {
  using Kind = ModelPage::Kind;
  const auto kind = rc::gen::weightedElement<Kind>({{6, Kind::kImage},
                                                    {3, Kind::kDropped},
                                                    {1, Kind::kAnonymous},
                                                    {1, Kind::kNothing},
                                                    {1, Kind::kOtherFile}});
  const auto page = rc::gen::apply(
      [](Kind k, int prot, bool wish, uint64_t shift, uint64_t inode) {
        return ModelPage{k, prot, wish, shift, inode};
      },
      kind, rc::gen::weightedElement<int>({{5, PROT_READ | PROT_WRITE}, {1, PROT_READ}}),
      rc::gen::weightedElement<bool>({{5, false}, {1, true}}),
      rc::gen::weightedElement<uint64_t>({{5, 0}, {1, 40}}),
      rc::gen::weightedElement<uint64_t>({{6, 7}, {1, 8}}));
  const auto run = rc::gen::pair(page, rc::gen::inRange<size_t>(1, 5));
  return rc::gen::map(rc::gen::container<std::vector<std::pair<ModelPage, size_t>>>(run),
                      [](const std::vector<std::pair<ModelPage, size_t>>& runs) {
                        Model model;
                        for (const auto& [p, count] : runs) model.insert(model.end(), count, p);
                        return model;
                      });
}

bool IsAnonymous(const ModelPage& page) {
  return page.kind == ModelPage::Kind::kDropped || page.kind == ModelPage::Kind::kAnonymous;
}

// Whether the kernel keeps pages i and i + 1 in one VMA when it joins what it can.
bool Joins(const ModelPage& a, const ModelPage& b) {
  if (a.prot != b.prot || a.huge_wish != b.huge_wish) return false;
  if (IsAnonymous(a) && IsAnonymous(b)) return true;
  return a.kind == b.kind && a.kind != ModelPage::Kind::kNothing && a.inode == b.inode &&
         a.file_shift == b.file_shift;
}

// The VMAs of a model. `cut(i)`: split after page i although the kernel need not.
template <class Cut>
std::vector<VmaInfo> VmasOf(const Model& model, Cut cut) {
  std::vector<VmaInfo> vmas;
  for (size_t i = 0; i < model.size(); ++i) {
    const ModelPage& page = model[i];
    if (page.kind == ModelPage::Kind::kNothing) continue;
    const VaddrRange range = PagesAt(kBase + i, kBase + i + 1);
    if (i > 0 && Joins(model[i - 1], page) && !cut(i - 1)) {
      vmas.back().range.end = range.end;
      continue;
    }
    VmaInfo vma;
    vma.range = range;
    vma.prot = page.prot;
    if (page.huge_wish) vma.vm_flags = {"rd", "hg"};
    if (!IsAnonymous(page)) {
      vma.offset = FileOffset((i + page.file_shift) * kPageSize);
      vma.inode = page.inode;
      vma.name = page.kind == ModelPage::Kind::kImage ? "image" : "other";
    }
    vmas.push_back(vma);
  }
  return vmas;
}

std::vector<VmaInfo> VmasOf(const Model& model) {
  return VmasOf(model, [](size_t) { return false; });
}

RangeSet DroppedOf(const Model& model) {
  RangeSet dropped;
  for (size_t i = 0; i < model.size(); ++i) {
    if (model[i].kind == ModelPage::Kind::kDropped)
      dropped.Insert(PagesAt(kBase + i, kBase + i + 1));
  }
  return dropped;
}

std::vector<Area> AreasOf(const std::vector<VmaInfo>& vmas, const Model& model) {
  return FindAreas(vmas, [](const VmaInfo& vma) { return vma.name == "image"; }, DroppedOf(model));
}

const ModelPage& PageAt(const Model& model, Vaddr at) {
  return model[at.value / kPageSize - kBase];
}

RC_GTEST_PROP(FindAreasProperties, EveryImagePageIsInExactlyOneAreaWithItsOwnFileOffset, ()) {
  const Model model = *Models();
  const auto areas = AreasOf(VmasOf(model), model);
  for (size_t i = 0; i < model.size(); ++i) {
    const Vaddr at((kBase + i) * kPageSize);
    size_t owners = 0;
    for (const Area& area : areas) {
      if (!area.range.Contains(at)) continue;
      ++owners;
      if (model[i].kind != ModelPage::Kind::kImage) continue;
      RC_ASSERT(area.OffsetOf(at) == FileOffset((i + model[i].file_shift) * kPageSize));
      RC_ASSERT(area.inode == model[i].inode);
    }
    const bool image = model[i].kind == ModelPage::Kind::kImage;
    RC_ASSERT(owners <= 1U && owners >= (image ? 1U : 0U));
  }
}

RC_GTEST_PROP(FindAreasProperties, AnAreaHoldsNothingButImageAndGivenBackPagesOfOneProtection, ()) {
  const Model model = *Models();
  for (const Area& area : AreasOf(VmasOf(model), model)) {
    RC_ASSERT(!area.range.empty());
    RC_ASSERT(area.range.Contains(area.file_vma));
    bool image = false;
    for (Vaddr at = area.range.begin; at < area.range.end; at = at + Bytes(kPageSize)) {
      const ModelPage& page = PageAt(model, at);
      image |= page.kind == ModelPage::Kind::kImage;
      RC_ASSERT(page.kind == ModelPage::Kind::kImage || page.kind == ModelPage::Kind::kDropped);
      RC_ASSERT(page.prot == area.prot);
      RC_ASSERT(page.huge_wish == area.HasFlag("hg"));
    }
    RC_ASSERT(image);
  }
}

RC_GTEST_PROP(FindAreasProperties, TwoAreasThatTouchCouldNotBeOne, ()) {
  const Model model = *Models();
  const auto areas = AreasOf(VmasOf(model), model);
  for (size_t i = 1; i < areas.size(); ++i) {
    const Area& a = areas[i - 1];
    const Area& b = areas[i];
    RC_ASSERT(a.range.end <= b.range.begin);
    if (a.range.end != b.range.begin) continue;
    RC_ASSERT(a.prot != b.prot || a.HasFlag("hg") != b.HasFlag("hg") || a.inode != b.inode ||
              a.OffsetOf(b.range.begin) != b.OffsetOf(b.range.begin));
  }
}

RC_GTEST_PROP(FindAreasProperties, HoweverTheKernelSplitsVmasTheAreasAreTheSame, ()) {
  const Model model = *Models();
  const auto cuts =
      *rc::gen::container<std::vector<bool>>(model.size(), rc::gen::arbitrary<bool>());
  const auto whole = AreasOf(VmasOf(model), model);
  // Of a VMA given back only in part, a split may make a piece that was given back as a whole.
  const auto cut = [&](size_t i) { return cuts[i] && !IsAnonymous(model[i]); };
  const auto split = AreasOf(VmasOf(model, cut), model);
  RC_ASSERT(whole.size() == split.size());
  for (size_t i = 0; i < whole.size(); ++i) {
    RC_ASSERT(whole[i].range == split[i].range);
    RC_ASSERT(whole[i].prot == split[i].prot);
    RC_ASSERT(whole[i].offset == split[i].offset);
    RC_ASSERT(whole[i].inode == split[i].inode);
  }
}

RC_GTEST_PROP(CutIntoBlocksProperties, TheBlocksAreTheRangeCutAtMultiplesOfTwoMebibytes, ()) {
  const auto begin = *rc::gen::inRange<uint64_t>(0, 3000);
  const auto length = *rc::gen::inRange<uint64_t>(0, 3000);
  const VaddrRange range = PagesAt(begin, begin + length);
  Vaddr at = range.begin;
  for (const VaddrRange block : CutIntoBlocks(range)) {
    RC_ASSERT(block.begin == at);
    RC_ASSERT(!block.empty());
    RC_ASSERT(AlignDown(block.begin.value, kHugePageSize) ==
              AlignDown(block.end.value - 1, kHugePageSize));
    RC_ASSERT(block.end == range.end || block.end.value % kHugePageSize == 0U);
    at = block.end;
  }
  RC_ASSERT(at == range.end);
}

RC_GTEST_PROP(ContentOfProperties, EachPageComesFromWhereTheProgramSawItLast, ()) {
  constexpr uint64_t kLimit = 60;
  const PageSet image = *PageSets(kLimit);
  const PageSet own = *PageSets(kLimit);
  const PageSet dropped = *PageSets(kLimit);
  const VaddrRange block = *PageRanges(kLimit);
  const BlockContent content = ContentOf(block, image.ranges, own.ranges, dropped.ranges);
  std::set<uint64_t> from_image;
  std::set<uint64_t> from_own;
  for (const uint64_t page : PagesOf({block})) {
    if (own.pages.contains(page)) {
      from_own.insert(page);
    } else if (image.pages.contains(page) && !dropped.pages.contains(page)) {
      from_image.insert(page);
    }
  }
  RC_ASSERT(PagesOf(content.own) == from_own);
  RC_ASSERT(PagesOf(content.image) == from_image);
  RC_ASSERT(InOrder(content.own) && InOrder(content.image));
  RC_ASSERT(content.size().value == (from_own.size() + from_image.size()) * kPageSize);
}

RC_GTEST_PROP(ContentOfProperties, OnlyAnAlignedBlockWithAllItsPagesIsFull, ()) {
  const auto begin = *rc::gen::element<uint64_t>(0, 512, 513, 1024);
  const auto pages = *rc::gen::element<uint64_t>(511, 512, 513, 1024);
  const VaddrRange block = PagesAt(begin, begin + pages);
  PageSet image;
  image.Insert(PagesAt(0, 4096));
  PageSet dropped;
  if (*rc::gen::arbitrary<bool>()) dropped.Insert(*PageRanges(2048));
  const BlockContent content = ContentOf(block, image.ranges, {}, dropped.ranges);
  const bool full = begin % 512 == 0 && pages == 512 && dropped.ranges.SizeWithin(block).value == 0;
  RC_ASSERT(content.IsFullBlock(block) == full);
}

RC_GTEST_PROP(PacerProperties, TheBatchStaysBetweenABlockAndItsLimit, ()) {
  const Bytes most(kHugePageSize * *rc::gen::inRange<uint64_t>(1, 64));
  Pacer pacer(Nanos(1'000'000), Bytes(kHugePageSize), most);
  for (const int64_t pause :
       *rc::gen::container<std::vector<int64_t>>(rc::gen::inRange<int64_t>(0, 3'000'000))) {
    const Bytes before = pacer.batch_size();
    if (pause % 7 == 0) {
      pacer.TooDirty();
    } else {
      pacer.Swapped(Nanos(pause));
    }
    RC_ASSERT(pacer.batch_size() >= Bytes(kHugePageSize) && pacer.batch_size() <= most);
    if (pause > 1'000'000 || pause % 7 == 0) RC_ASSERT(pacer.batch_size() <= before);
  }
}

}  // namespace
}  // namespace unmoor::properties
