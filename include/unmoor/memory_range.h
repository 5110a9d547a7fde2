// MemoryRange: memory of this process, as the library's functions take and return it. A plain
// value.
#pragma once

#include <cstddef>

namespace unmoor {
inline namespace v1 {

// [begin, begin + size). Page-aligned where a function says nothing else.
struct MemoryRange {
  void* begin = nullptr;
  size_t size = 0;
};

}  // namespace v1
}  // namespace unmoor
