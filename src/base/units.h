// Strong types for units: addresses, file offsets, lengths, page counts, times, process ids.
//
// A Vaddr is never a FileOffset and a PageCount never a byte length; mixing them does not compile.
// Ranges are half-open, [begin, end). All of them are plain values.
#pragma once

#include <fmt/format.h>

#include <compare>
#include <cstdint>
#include <string>

namespace unmoor {

inline constexpr uint64_t kPageSize = 4096;
inline constexpr uint64_t kHugePageSize = uint64_t{2} << 20;

// A number with a unit. `Tag` names the unit and is never instantiated.
template <class Tag, class Rep = uint64_t>
struct Quantity {
  Rep value = 0;

  constexpr Quantity() = default;
  constexpr explicit Quantity(Rep v) : value(v) {}
  constexpr auto operator<=>(const Quantity&) const = default;
  constexpr Quantity& operator+=(Quantity other) { return value += other.value, *this; }
  constexpr Quantity& operator-=(Quantity other) { return value -= other.value, *this; }
  friend constexpr Quantity operator+(Quantity a, Quantity b) {
    return Quantity(a.value + b.value);
  }
  friend constexpr Quantity operator-(Quantity a, Quantity b) {
    return Quantity(a.value - b.value);
  }
};

using Bytes = Quantity<struct BytesTag>;
using PageCount = Quantity<struct PageCountTag>;
using Nanos = Quantity<struct NanosTag, int64_t>;

// A process or thread id as seen from our own PID namespace.
struct Pid {
  int value = 0;
  constexpr auto operator<=>(const Pid&) const = default;
};

// A point on an axis of bytes: point + Bytes is a point, point - point is Bytes.
template <class Tag>
struct Point {
  uint64_t value = 0;

  constexpr Point() = default;
  constexpr explicit Point(uint64_t v) : value(v) {}
  constexpr auto operator<=>(const Point&) const = default;
  friend constexpr Point operator+(Point p, Bytes n) { return Point(p.value + n.value); }
  friend constexpr Point operator-(Point p, Bytes n) { return Point(p.value - n.value); }
  friend constexpr Bytes operator-(Point a, Point b) { return Bytes(a.value - b.value); }
};

using Vaddr = Point<struct VaddrTag>;
using FileOffset = Point<struct FileOffsetTag>;

template <class P>
struct Range {
  P begin;
  P end;

  constexpr auto operator<=>(const Range&) const = default;
  [[nodiscard]] constexpr Bytes size() const { return end - begin; }
  [[nodiscard]] constexpr bool empty() const { return end <= begin; }
  [[nodiscard]] constexpr bool Contains(P p) const { return begin <= p && p < end; }
  [[nodiscard]] constexpr bool Contains(Range r) const { return begin <= r.begin && r.end <= end; }
  [[nodiscard]] constexpr bool Overlaps(Range r) const { return begin < r.end && r.begin < end; }
  [[nodiscard]] constexpr Range Intersect(Range r) const {
    const Range i{begin > r.begin ? begin : r.begin, end < r.end ? end : r.end};
    return i.begin < i.end ? i : Range{i.begin, i.begin};
  }
};

using VaddrRange = Range<Vaddr>;
using FileRange = Range<FileOffset>;

[[nodiscard]] constexpr Bytes ToBytes(PageCount n) {
  return Bytes(n.value * kPageSize);
}
// Rounds down; callers check alignment where it matters.
[[nodiscard]] constexpr PageCount ToPages(Bytes n) {
  return PageCount(n.value / kPageSize);
}

[[nodiscard]] constexpr uint64_t AlignDown(uint64_t v, uint64_t alignment) {
  return v & ~(alignment - 1);
}
[[nodiscard]] constexpr uint64_t AlignUp(uint64_t v, uint64_t alignment) {
  return AlignDown(v + alignment - 1, alignment);
}

// "512 B", "64.0 KiB", "463.2 MiB", "4.0 GiB".
[[nodiscard]] std::string HumanBytes(Bytes n);
// "740 ns", "12.3 us", "4.1 ms", "2.0 s".
[[nodiscard]] std::string HumanTime(Nanos t);

}  // namespace unmoor

template <>
struct fmt::formatter<unmoor::Vaddr> : fmt::formatter<uint64_t> {
  auto format(unmoor::Vaddr v, fmt::format_context& context) const {
    return fmt::format_to(context.out(), "{:#x}", v.value);
  }
};

template <>
struct fmt::formatter<unmoor::VaddrRange> : fmt::formatter<uint64_t> {
  auto format(unmoor::VaddrRange r, fmt::format_context& context) const {
    return fmt::format_to(context.out(), "{:x}-{:x}", r.begin.value, r.end.value);
  }
};
