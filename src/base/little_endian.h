// Integers in files: little-endian, of explicit size, at explicit offsets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace unmoor {

// The caller has checked that `at + sizeof(T)` lies within.
template <class T>
void PutLittleEndian(std::span<std::byte> bytes, size_t at, T value) {
  for (size_t i = 0; i < sizeof(T); ++i) {
    bytes[at + i] = static_cast<std::byte>((value >> (8 * i)) & 0xff);
  }
}

template <class T>
[[nodiscard]] T GetLittleEndian(std::span<const std::byte> bytes, size_t at) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) {
    value = static_cast<T>(value | static_cast<T>(bytes[at + i]) << (8 * i));
  }
  return value;
}

}  // namespace unmoor
