// A process tree whose memory is words, dumped as PageRouter dumps a real one, and what a restore
// of an image would show.
//
// Real are: LayerWriter, DeltaWriter, Parent, Overlay, LayerReader, manifest, PlanRestore and
// Publisher. Simulated are only the program and the kernel's mapping: what a restored VMA reads is
// its layer's file at the plan's offset, with the plan's loads over it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "base/result.h"

namespace unmoor {

struct SimulatedTask {
  uint32_t parent = 0;                 // 0: the root
  std::map<uint64_t, uint64_t> vmas;   // first page -> end
  std::map<uint64_t, uint64_t> pages;  // page -> word; 0 is a page of zeros, absent reads zero

  [[nodiscard]] uint64_t Read(uint64_t page) const {
    const auto found = pages.find(page);
    return found == pages.end() ? 0 : found->second;
  }
  void Unmap(uint64_t begin, uint64_t end);
  // Over whatever is there.
  void Map(uint64_t begin, uint64_t end);
};

using SimulatedTree = std::map<uint32_t, SimulatedTask>;  // by vpid; 1 is the root

// Writes an image of the tree, a delta to the image in `parent` if there is one. With `sync` it is
// durable.
[[nodiscard]] Result<> DumpTree(const SimulatedTree& tree, const std::string& directory,
                                const std::optional<std::string>& parent, bool sync = false);

// What stock criu would have written of it. Without `pages`: its metadata as it is beside a layer.
[[nodiscard]] Result<> DumpStock(const SimulatedTree& tree, const std::string& directory,
                                 bool pages);

// An error unless a restore of the image would show just this tree, and each VMA would grow into
// zeros.
[[nodiscard]] Result<> ExpectShows(const std::string& directory, const SimulatedTree& tree);

}  // namespace unmoor
