// Human-readable units. See units.h.
#include "base/units.h"

#include <array>

namespace unmoor {

std::string HumanBytes(Bytes n) {
  constexpr std::array kNames = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto v = static_cast<double>(n.value);
  size_t unit = 0;
  while (v >= 1024 && unit + 1 < kNames.size()) {
    v /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", n.value) : fmt::format("{:.1f} {}", v, kNames[unit]);
}

std::string HumanTime(Nanos t) {
  const auto v = static_cast<double>(t.value);
  if (v < 1e3) return fmt::format("{} ns", t.value);
  if (v < 1e6) return fmt::format("{:.1f} us", v / 1e3);
  if (v < 1e9) return fmt::format("{:.1f} ms", v / 1e6);
  return fmt::format("{:.2f} s", v / 1e9);
}

}  // namespace unmoor
