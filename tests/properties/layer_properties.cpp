// A layer on disk: whatever pages a writer is given, in whatever pieces, the file holds them where
// the address says, zeros everywhere else, and the reader finds just the pages that are not zero.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstring>
#include <map>

#include "generators.h"
#include "image/layer_reader.h"
#include "image/layer_writer.h"
#include "image/layout.h"
#include "os/file.h"

namespace unmoor::properties {
namespace {

constexpr uint32_t kTask = 5;

class Directory {
 public:
  Directory() : path_(MakeTemporaryDirectory(::testing::TempDir(), "unmoor-property-").value()) {}
  ~Directory() { (void)RemoveTree(path_); }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::vector<std::byte> PageOf(uint64_t word) {
  std::vector<std::byte> page(kPageSize);
  std::memcpy(&page[(word * 8) % kPageSize], &word, sizeof word);
  return page;
}

// Writes `pages` (number → word, 0: a page of zeros) in runs of random length.
void WriteAll(LayerWriter& writer, const std::map<uint64_t, uint64_t>& pages) {
  std::vector<std::byte> run;
  uint64_t run_begin = 0;
  const auto flush = [&] {
    if (run.empty()) return;
    RC_ASSERT(writer.Write(kTask, Vaddr(run_begin * kPageSize), run).has_value());
    run.clear();
  };
  for (const auto& [number, word] : pages) {
    const bool follows = number == run_begin + run.size() / kPageSize;
    const bool same_vma = follows && !run.empty() &&
                          writer.VmaOf(kTask, Vaddr(run_begin * kPageSize))
                              .value()
                              .Contains(Vaddr(number * kPageSize));
    if (!same_vma || number % 5 == 0) flush();
    if (run.empty()) run_begin = number;
    const auto page = PageOf(word);
    run.insert(run.end(), page.begin(), page.end());
  }
  flush();
}

RC_GTEST_PROP(LayerProperties, TheFileHoldsEachPageAtItsPlaceAndZerosElsewhere, ()) {
  const std::vector<VaddrRange> vmas = {PagesAt(100, 140), PagesAt(140, 150), PagesAt(600, 660)};
  std::map<uint64_t, uint64_t> pages;
  for (const VaddrRange vma : vmas) {
    for (const uint64_t page : (*PageSets(vma.size().value / kPageSize)).pages) {
      pages[vma.begin.value / kPageSize + page] = *rc::gen::weightedOneOf<uint64_t>(
          {{1, rc::gen::just<uint64_t>(0)}, {4, rc::gen::inRange<uint64_t>(1, 1 << 30)}});
    }
  }
  const Directory directory;
  const std::string id(kLayerIdLength, 'a');
  auto writer = LayerWriter::Create(directory.path(), id);
  RC_ASSERT(writer.has_value());
  RC_ASSERT(writer->AddTask(kTask, vmas).has_value());
  WriteAll(*writer, pages);
  const auto info = writer->Finish(false);
  RC_ASSERT(info.has_value());

  auto reader = LayerReader::Open(directory.path() + "/" + id + ".pages",
                                  directory.path() + "/" + id + ".index");
  RC_ASSERT(reader.has_value());
  RC_ASSERT(reader->LoadHashes().has_value());
  RC_ASSERT(reader->VerifyAll().has_value());
  RC_ASSERT(reader->extents().size() == vmas.size());
  std::set<uint64_t> not_zero;
  for (const auto& [number, word] : pages) {
    if (word != 0) not_zero.insert(number);
  }
  std::vector<VaddrRange> segments;
  for (const Segment& segment : reader->segments()) segments.push_back(segment.range);
  RC_ASSERT(PagesOf(segments) == not_zero);
  for (const VaddrRange vma : vmas) {
    for (Vaddr at = vma.begin; at < vma.end; at = at + Bytes(kPageSize)) {
      const Extent* extent = reader->FindExtent(kTask, at);
      RC_ASSERT(extent != nullptr && extent->range == vma);
      std::vector<std::byte> page(kPageSize);
      RC_ASSERT(
          ReadExactlyAt(reader->pages_fd().get(), page, extent->offset + (at - vma.begin), "pages")
              .has_value());
      const auto found = pages.find(at.value / kPageSize);
      RC_ASSERT(page ==
                (found == pages.end() ? std::vector<std::byte>(kPageSize) : PageOf(found->second)));
    }
  }
}

}  // namespace
}  // namespace unmoor::properties
