// The memory of one round: some ranges of random size and protection, laid out as a page image,
// direct-mapped at fixed addresses, and cut into chunks, each of which belongs to one writer.
//
// What each page must hold is kept beside it in ordinary memory (the ledger), which is never
// direct-mapped. A chunk and its ledger are touched by its writer only; the arena's list of them is
// made before the writers start and does not change.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "options.h"
#include "unmoor/direct_map.h"
#include "unmoor/page_image.h"

namespace torture {

using Random = std::mt19937_64;

inline uint64_t Below(Random& random, uint64_t bound) {
  return random() % bound;
}
inline bool OneIn(Random& random, uint64_t n) {
  return random() % n == 0;
}

struct ArenaRange {
  uint64_t address = 0;
  uint64_t pages = 0;
  int protection = 0;
  bool quiet = false;  // no system call writes here: fit for the fault guard
};

enum class Use { kPages, kStack, kSignalStack };

// A run of pages of one writer.
struct Chunk {
  uint64_t* base = nullptr;
  uint64_t first_number = 0;  // of its first page; different for every page of a run
  int protection = 0;
  bool quiet = false;
  Use use = Use::kPages;
  size_t reserved = 0;  // pages at its begin that are not in the ledger's care
  struct Page {
    uint64_t sequence = 0;  // of the last write of the writer's own
    bool zero = true;
    uint64_t number = 0;  // what it holds: its own number and sequence, or somebody else's
    uint64_t shown = 0;
  };
  std::vector<Page> ledger;

  [[nodiscard]] size_t count() const { return ledger.size(); }
  [[nodiscard]] uint64_t* At(size_t page) const { return base + page * 512; }
  void Write(size_t page) { WriteAt(page, At(page)); }
  void WriteAt(size_t page, uint64_t* place);                   // where it is for the moment
  void Holds(size_t page, uint64_t number, uint64_t sequence);  // a system call wrote that
  void Check(size_t page, const char* when) const;
  void Check(size_t page, const uint64_t* place, const char* when) const;
  // Fails unless the page is as last written, or zeros: after MADV_FREE.
  void CheckFreed(size_t page) const;
  void SetZero(size_t page) { ledger[page].zero = true; }
};

class Arena {
 public:
  // `round` makes page numbers unique.
  Arena(const Options& options, Random& random, uint64_t round, size_t writers, bool fault_guard);

  // Writes the image, opens and maps it.
  void Build(const std::string& directory);
  void Unmap();

  [[nodiscard]] const std::vector<ArenaRange>& ranges() const { return ranges_; }
  [[nodiscard]] std::vector<unmoor::MemoryRange> MemoryRanges() const;
  [[nodiscard]] std::vector<Chunk*> ChunksOf(size_t writer);
  [[nodiscard]] unmoor::PageImage& image() { return *image_; }
  // 512 words that every writer adds to.
  [[nodiscard]] uint64_t* counters() const { return counters_; }
  // Checkpoints the quiet memory into `directory`, maps that anywhere, and compares every page.
  void CheckpointAndCompare(const std::string& directory);

 private:
  void AddRanges(const Options& options, Random& random, bool fault_guard);
  void CutIntoChunks(Random& random, uint64_t round, size_t writers, bool stacks);
  void FillFor(uint64_t address, char* pages, size_t size) const;

  std::vector<ArenaRange> ranges_;
  std::vector<std::unique_ptr<Chunk>> chunks_;  // ascending by address
  std::vector<size_t> owners_;
  uint64_t* counters_ = nullptr;
  std::optional<unmoor::PageImage> image_;
  std::optional<unmoor::DirectMap> map_;
};

}  // namespace torture
