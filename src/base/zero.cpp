// See zero.h.
#include "base/zero.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace unmoor {

bool IsZero(std::span<const std::byte> bytes) {
  static constexpr std::array<std::byte, 256> kZeros{};
  for (; !bytes.empty(); bytes = bytes.subspan(std::min(bytes.size(), kZeros.size()))) {
    if (std::memcmp(bytes.data(), kZeros.data(), std::min(bytes.size(), kZeros.size())) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace unmoor
