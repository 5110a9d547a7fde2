// A set of addresses kept as disjoint, sorted, non-touching ranges. A plain value; not thread-safe.
#pragma once

#include <map>
#include <vector>

#include "base/units.h"

namespace unmoor {

class RangeSet {
 public:
  RangeSet() = default;

  void Insert(VaddrRange range);
  void Erase(VaddrRange range);
  [[nodiscard]] bool empty() const { return ranges_.empty(); }
  // The parts of `range` in the set, and the parts that are not, both in order.
  [[nodiscard]] std::vector<VaddrRange> Inside(VaddrRange range) const;
  [[nodiscard]] std::vector<VaddrRange> Outside(VaddrRange range) const;
  [[nodiscard]] Bytes SizeWithin(VaddrRange range) const;

 private:
  std::map<Vaddr, Vaddr> ranges_;  // begin -> end
};

}  // namespace unmoor
