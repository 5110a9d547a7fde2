// What the library's tests share: a temporary directory, memory of our own at chosen addresses with
// known contents, and checks of both.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <string>
#include <vector>

#include "base/units.h"
#include "os/file.h"
#include "unmoor/checkpoint.h"
#include "unmoor/direct_map.h"
#include "unmoor/page_image.h"

namespace unmoor {

// A Status or StatusOr that is ok, or its message in the test's output.
inline const Status& StatusOf(const Status& status) {
  return status;
}
template <class T>
const Status& StatusOf(const StatusOr<T>& value) {
  return value.status();
}
#define ASSERT_STATUS_OK(expression)                                        \
  do {                                                                      \
    const auto& unmoor_checked = (expression);                              \
    ASSERT_TRUE(unmoor_checked.ok()) << StatusOf(unmoor_checked).message(); \
  } while (false)
#define EXPECT_CODE(expected, expression)                                                       \
  do {                                                                                          \
    const auto& unmoor_checked = (expression);                                                  \
    EXPECT_EQ(StatusOf(unmoor_checked).code(), expected) << StatusOf(unmoor_checked).message(); \
    EXPECT_EQ(StatusOf(unmoor_checked).message().find('\n'), std::string::npos);                \
  } while (false)

class TemporaryDirectory {
 public:
  explicit TemporaryDirectory(const std::string& parent = ::testing::TempDir())
      : path_(MakeTemporaryDirectory(parent, "unmoor-test-").value()) {}
  ~TemporaryDirectory() { (void)RemoveTree(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  [[nodiscard]] std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Where tests map at addresses of their choice: far from what else there is, and where the address
// sanitizer lets a program map.
#ifdef __SANITIZE_ADDRESS__
inline constexpr uint64_t kTestAddresses = 0x5000'0000'0000;
#else
inline constexpr uint64_t kTestAddresses = 0;
#endif

// Anonymous memory at a fixed address.
class Memory {
 public:
  explicit Memory(size_t pages, uint64_t address = kTestAddresses + 0x2'1234'5000)
      : size_(pages * kPageSize) {
    void* const at = reinterpret_cast<void*>(address);
    data_ = static_cast<uint8_t*>(::mmap(at, size_, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0));
    if (data_ != at) std::abort();
  }
  ~Memory() { Unmap(); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void Unmap() {
    if (data_ != nullptr) ::munmap(data_, size_);
    data_ = nullptr;
  }
  [[nodiscard]] uint8_t* page(size_t index) const { return data_ + index * kPageSize; }
  [[nodiscard]] MemoryRange range() const { return {data_, size_}; }
  [[nodiscard]] MemoryRange part(size_t page_index, size_t pages) const {
    return {page(page_index), pages * kPageSize};
  }
  [[nodiscard]] uint64_t address() const { return reinterpret_cast<uint64_t>(data_); }
  [[nodiscard]] std::vector<uint8_t> Copy() const { return {data_, data_ + size_}; }
  // Contents that tell the page, never zero.
  void Fill(size_t first, size_t count, uint8_t salt = 1) {
    for (size_t i = first; i < first + count; ++i) {
      std::memset(page(i), static_cast<int>(1 + (i * 7 + salt * 31u) % 255), kPageSize);
      std::memcpy(page(i), &i, sizeof i);
      page(i)[kPageSize - 1] = salt;
    }
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

inline std::vector<uint8_t> BytesAt(const MemoryRange& range) {
  const auto* data = static_cast<const uint8_t*>(range.begin);
  return {data, data + range.size};
}

// The protections of [begin, begin + size) as /proc/self/maps has them, joined: "rw-p".
std::string ProtectionsOf(const MemoryRange& range);

}  // namespace unmoor
