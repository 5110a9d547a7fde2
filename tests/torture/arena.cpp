// See arena.h.
#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "failure.h"
#include "pages.h"
#include "unmoor/checkpoint.h"

#if defined(__SANITIZE_ADDRESS__)
#define UNMOOR_TORTURE_BASE 0x200000000000  // above its shadow
#else
#define UNMOOR_TORTURE_BASE 0x4000000000  // where mmap never goes by itself; TSan allows it
#endif

namespace torture {
namespace {

constexpr uint64_t kBase = UNMOOR_TORTURE_BASE;
constexpr uint64_t kHugePages = 512;
constexpr size_t kStackPages = 64;
constexpr size_t kSignalStackPages = 32;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kStacksInArena = false;  // they keep their own notion of where stacks are
#else
constexpr bool kStacksInArena = true;
#endif

}  // namespace

void Chunk::WriteAt(size_t page, uint64_t* place) {
  Page& expected = ledger[page];
  ++expected.sequence;
  Holds(page, first_number + page, expected.sequence);
  pages::Fill(place, expected.number, expected.shown);
}

void Chunk::Holds(size_t page, uint64_t number, uint64_t sequence) {
  ledger[page].zero = false;
  ledger[page].number = number;
  ledger[page].shown = sequence;
}

void Chunk::Check(size_t page, const char* when) const {
  Check(page, At(page), when);
}

void Chunk::Check(size_t page, const uint64_t* place, const char* when) const {
  const Page& expected = ledger[page];
  const bool right =
      expected.zero ? pages::IsZero(place) : pages::Holds(place, expected.number, expected.shown);
  if (right) return;
  char what[256];
  pages::Describe(place, expected.number, expected.zero ? 0 : expected.shown, what, sizeof what);
  Fail("page %zu of %zu of the chunk at %p, %s%s, must %s %llu but %s", page, count(),
       static_cast<const void*>(base), when, quiet ? ", quiet" : "",
       expected.zero ? "be zero; before that it held write" : "hold write",
       (unsigned long long)expected.shown, what);
}

void Chunk::CheckFreed(size_t page) const {
  if (!pages::IsZero(At(page))) Check(page, "after MADV_FREE");
}

Arena::Arena(const Options& options, Random& random, uint64_t round, size_t writers,
             bool fault_guard) {
  AddRanges(options, random, fault_guard);
  CutIntoChunks(random, round, writers, kStacksInArena && Allows(options, "stacks"));
}

// A few ranges of a few pages to many megabytes, some touching, most at odd distances.
void Arena::AddRanges(const Options& options, Random& random, bool fault_guard) {
  const uint64_t most = options.mib * 256;
  uint64_t left = 32 + Below(random, most);
  uint64_t at = kBase / 4096 + Below(random, 2 * kHugePages);
  while (left > 0 && ranges_.size() < 12) {
    ArenaRange range;
    const uint64_t limit = std::min<uint64_t>(left, OneIn(random, 3) ? left : 700);
    range.pages = 1 + Below(random, limit);
    range.address = at * 4096;
    constexpr int kReadWrite = PROT_READ | PROT_WRITE;
    const uint64_t kind = Below(random, 16);
    range.protection = ranges_.empty() || kind > 3 ? kReadWrite
                       : kind == 0                 ? PROT_READ
                       : kind == 1                 ? PROT_NONE
                       : kind == 2                 ? PROT_READ | PROT_EXEC
                                                   : kReadWrite | PROT_EXEC;
    range.quiet = fault_guard && !OneIn(random, 3);
    ranges_.push_back(range);
    left -= range.pages;
    at += range.pages + (OneIn(random, 4) ? 0 : 1 + Below(random, 3 * kHugePages));
  }
}

void Arena::CutIntoChunks(Random& random, uint64_t round, size_t writers, bool stacks) {
  uint64_t number = (round + 1) << 32;
  size_t next_owner = Below(random, writers);
  for (const ArenaRange& range : ranges_) {
    uint64_t page = 0;
    if (counters_ == nullptr) {
      counters_ = reinterpret_cast<uint64_t*>(range.address);  // SAFETY: mapped by Build
      page = 1;
    }
    const bool small = OneIn(random, 2);
    while (page < range.pages) {
      const uint64_t size =
          std::min(range.pages - page, 1 + Below(random, small ? 24 : range.pages));
      auto chunk = std::make_unique<Chunk>();
      chunk->base = reinterpret_cast<uint64_t*>(range.address + page * 4096);  // SAFETY: as above
      chunk->first_number = number;
      chunk->protection = range.protection;
      chunk->quiet = range.quiet;
      const bool writable = (range.protection & PROT_WRITE) != 0;
      if (stacks && writable && size >= kStackPages && OneIn(random, 3)) {
        chunk->use = Use::kStack;
      } else if (stacks && writable && size >= kSignalStackPages && OneIn(random, 3)) {
        chunk->use = Use::kSignalStack;
      }
      chunk->ledger.resize(size);
      for (size_t i = 0; i < size; ++i) {
        if (chunk->use != Use::kPages || OneIn(random, 4)) continue;
        chunk->ledger[i].sequence = 1;
        chunk->Holds(i, number + i, 1);
      }
      chunks_.push_back(std::move(chunk));
      owners_.push_back(next_owner++ % writers);
      number += size;
      page += size;
    }
  }
}

void Arena::FillFor(uint64_t address, char* out, size_t size) const {
  std::memset(out, 0, size);
  for (const auto& chunk : chunks_) {
    const auto base = reinterpret_cast<uint64_t>(chunk->base);
    for (size_t page = 0; page < chunk->count(); ++page) {
      const uint64_t at = base + page * 4096;
      if (at < address || at >= address + size || chunk->ledger[page].zero) continue;
      pages::Fill(reinterpret_cast<uint64_t*>(out + (at - address)), chunk->ledger[page].number,
                  chunk->ledger[page].shown);
    }
  }
}

void Arena::Build(const std::string& directory) {
  unmoor::WriterOptions options;
  options.sync = false;
  options.replace = true;
  auto writer = unmoor::PageImageWriter::Create(directory, options);
  if (!writer.ok()) Fail("no image: %s", writer.status().message().c_str());
  for (const ArenaRange& range : ranges_) {
    const unmoor::Status added = writer->Add(range.address, range.pages * 4096, range.protection,
                                             [this](uint64_t address, void* pages, size_t size) {
                                               FillFor(address, static_cast<char*>(pages), size);
                                               return unmoor::Status();
                                             });
    if (!added.ok()) Fail("no image: %s", added.message().c_str());
  }
  const auto report = writer->Publish();
  if (!report.ok()) Fail("no image: %s", report.status().message().c_str());
  auto image = unmoor::PageImage::Open(directory);
  if (!image.ok()) Fail("image not opened: %s", image.status().message().c_str());
  image_ = std::move(*image);
  auto map = unmoor::DirectMap::Map(*image_);
  if (!map.ok()) Fail("image not mapped: %s", map.status().message().c_str());
  map_ = std::move(*map);
  // From here on it is the program's: writers unmap and map as they like.
  map_->Release();
}

void Arena::Unmap() {
  map_.reset();
  image_.reset();
  for (const ArenaRange& range : ranges_) {
    // SAFETY: the whole range is this arena's, and its writers are gone.
    munmap(reinterpret_cast<void*>(range.address), range.pages * 4096);
  }
}

std::vector<unmoor::MemoryRange> Arena::MemoryRanges() const {
  std::vector<unmoor::MemoryRange> ranges;
  for (const ArenaRange& range : ranges_) {
    // SAFETY: only named here.
    ranges.push_back({reinterpret_cast<void*>(range.address), range.pages * 4096});
  }
  return ranges;
}

std::vector<Chunk*> Arena::ChunksOf(size_t writer) {
  std::vector<Chunk*> chunks;
  for (size_t i = 0; i < chunks_.size(); ++i) {
    if (owners_[i] == writer) chunks.push_back(chunks_[i].get());
  }
  return chunks;
}

void Arena::CheckpointAndCompare(const std::string& directory) {
  std::vector<unmoor::MemoryRange> memory;
  for (const ArenaRange& range : ranges_) {
    // Ranges without PROT_READ are refused when they hold data.
    if ((range.protection & PROT_READ) == 0) continue;
    memory.push_back({reinterpret_cast<void*>(range.address), range.pages * 4096});
  }
  unmoor::CheckpointOptions options;
  options.base = &*image_;
  options.sync = false;
  options.replace = true;
  const auto report = unmoor::Checkpoint(memory, directory, options);
  if (!report.ok()) Fail("checkpoint: %s", report.status().message().c_str());
  auto image = unmoor::PageImage::Open(directory);
  if (!image.ok()) Fail("checkpoint not opened: %s", image.status().message().c_str());
  unmoor::MapOptions anywhere;
  anywhere.placement = unmoor::Placement::kAnywhere;
  auto map = unmoor::DirectMap::Map(*image, anywhere);
  if (!map.ok()) Fail("checkpoint not mapped: %s", map.status().message().c_str());
  for (const auto& chunk : chunks_) {
    if ((chunk->protection & PROT_READ) == 0 || chunk->use != Use::kPages) continue;
    for (size_t page = chunk->reserved; page < chunk->count(); ++page) {
      const auto* place =
          static_cast<const uint64_t*>(map->Find(reinterpret_cast<uint64_t>(chunk->At(page))));
      if (place == nullptr) Fail("page at %p is not in the checkpoint", (void*)chunk->At(page));
      chunk->Check(page, place, "in the checkpoint of it");
    }
  }
}

}  // namespace torture
