// See journal.h.
#include "lazy/journal.h"

#include <new>

#include "os/shared_memory.h"

namespace unmoor {
namespace {

// Twenty million events of a program while its memory comes; used only as they happen.
constexpr Bytes kRoom(uint64_t{1} << 30);
constexpr size_t kHeaderSize = kPageSize;

}  // namespace

Result<LazyJournal> LazyJournal::Create() {
  UNMOOR_ASSIGN(const std::span<std::byte> memory, MapSharedMemory(kRoom));
  auto* const header = new (memory.data()) Header{};
  const std::span<std::byte> rest = memory.subspan(kHeaderSize);
  // SAFETY: zeros are records, aligned to a page, written before they are read.
  auto* const first = reinterpret_cast<LazyRecord*>(rest.data());
  return LazyJournal(header, {first, rest.size() / sizeof(LazyRecord)});
}

void LazyJournal::Append(const LazyRecord& record) {
  const uint64_t count = header_->count.load(std::memory_order_relaxed);
  if (count == room_.size()) {
    header_->full.store(1, std::memory_order_release);
    return;
  }
  room_[count] = record;
  header_->count.store(count + 1, std::memory_order_release);
}

std::span<const LazyRecord> LazyJournal::records() const {
  return room_.first(header_->count.load(std::memory_order_acquire));
}

bool LazyJournal::whole() const {
  return header_->reading.load(std::memory_order_acquire) == 0 &&
         header_->full.load(std::memory_order_acquire) == 0;
}

}  // namespace unmoor
