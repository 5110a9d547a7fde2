// See subject.h.
#include "subject.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <span>

#include "image/layer_writer.h"
#include "os/process_control.h"

namespace unmoor::testing_agent {

void Signals::Fail(const std::string& what) {
  if (errors.fetch_add(1) == 0) what.copy(first_error, sizeof(first_error) - 1);
}

bool WaitUntil(const std::function<bool()>& condition, Nanos limit) {
  const Nanos began = MonotonicNow();
  while (!condition()) {
    if (MonotonicNow() - began > limit) return false;
    SleepFor(Nanos(200'000));
  }
  return true;
}

uint64_t ImageWord(uint64_t page) {
  return page % 8 == 7 ? 0 : (page + 1) * 0x9e3779b97f4a7c15u;
}

PageImage MakePageImage(const std::string& directory, uint64_t pages) {
  const PageImage image{directory + "/layers/a.pages", pages};
  ::mkdir((directory + "/layers").c_str(), 0755);
  const int fd = ::open(image.path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  std::vector<uint64_t> words(7 * kPageSize / 8);
  bool ok = fd >= 0 && ::ftruncate(fd, static_cast<off_t>(pages * kPageSize * 2)) == 0;
  for (uint64_t page = 0; page < pages; page += 8) {
    const uint64_t count = std::min<uint64_t>(7, pages - page);
    for (uint64_t i = 0; i < count; ++i) {
      std::fill_n(words.begin() + static_cast<long>(i * 512), 512, ImageWord(page + i));
    }
    ok = ok &&
         ::pwrite(fd, words.data(), count * kPageSize, static_cast<off_t>(page * kPageSize)) > 0;
  }
  ::close(fd);
  if (!ok) std::abort();
  return image;
}

PageImage MakeLayer(const std::string& directory, uint64_t pages) {
  const std::string layers = directory + "/layers";
  const std::string id = "00112233445566778899aabbccddeeff";
  const Vaddr begin(uint64_t{1} << 32);
  std::vector<uint64_t> words(kPageSize / 8);
  auto writer = LayerWriter::Create(layers, id);
  bool ok = writer && writer->AddTask(1, {{{begin, begin + Bytes(pages * kPageSize)}}});
  for (uint64_t page = 0; page < pages && ok; ++page) {
    if (page % 8 == 7) continue;
    std::ranges::fill(words, ImageWord(page));
    ok = writer->Write(1, begin + Bytes(page * kPageSize), std::as_bytes(std::span(words)))
             .has_value();
  }
  const auto info = ok ? writer->Finish(false) : Result<LayerInfo>();
  if (!ok || !info || info->extents.front().offset != FileOffset(0)) std::abort();
  return {layers + "/" + id + ".pages", pages};
}

Memory::Memory(const PageImage& image, Signals& signals) : signals_(signals) {
  const uint64_t size = image.pages * kPageSize;
  // SAFETY: the fixed address is the middle of a mapping of our own.
  void* hole =
      ::mmap(nullptr, size + 4 * kHugePageSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const auto begin = AlignUp(reinterpret_cast<uint64_t>(hole), kHugePageSize) + kHugePageSize;
  const int fd = ::open(image.path.c_str(), O_RDWR | O_CLOEXEC);
  void* mapped = ::mmap(reinterpret_cast<void*>(begin), size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_FIXED, fd, 0);
  ::close(fd);
  if (hole == MAP_FAILED || mapped == MAP_FAILED) std::abort();
  data_ = static_cast<std::byte*>(mapped);
  expected_.resize(image.pages);
  for (uint64_t page = 0; page < image.pages; ++page) expected_[page] = ImageWord(page);
}

void Memory::Check(uint64_t page, const char* when) {
  // SAFETY: a page of ours, read as words.
  const auto* words = reinterpret_cast<const volatile uint64_t*>(At(page));
  for (const size_t i : {0, 100, 255, 511}) {
    const uint64_t read = words[i];
    if (read == expected_[page]) continue;
    signals_.Fail(fmt::format("{}: page {} word {} reads {:x} instead of {:x}", when, page, i, read,
                              expected_[page]));
  }
}

void Memory::CheckAll(const char* when) {
  for (uint64_t page = 0; page < pages(); ++page) Check(page, when);
}

void Memory::Write(uint64_t page) {
  auto* words = reinterpret_cast<volatile uint64_t*>(At(page));  // SAFETY: as in Check
  expected_[page] = next_.fetch_add(1) << 20 | page;
  for (const size_t i : {0, 100, 255, 511}) words[i] = expected_[page];
}

void Memory::GiveBack(uint64_t page, uint64_t count, int advice) {
  if (::madvise(At(page), count * kPageSize, advice) != 0) {
    signals_.Fail(fmt::format("madvise({}): {}", advice, std::strerror(errno)));
    return;
  }
  for (uint64_t i = page; i < page + count; ++i) expected_[i] = 0;
}

void Memory::Shorten(uint64_t pages) {
  if (::munmap(At(pages), (expected_.size() - pages) * kPageSize) != 0) std::abort();
}

void Memory::GrowAgain(uint64_t from) {
  const uint64_t whole = expected_.size() * kPageSize;
  void* const grown = ::mremap(data_, from * kPageSize, whole, MREMAP_MAYMOVE);
  if (grown == MAP_FAILED) std::abort();
  MovedTo(static_cast<std::byte*>(grown));
  std::fill(expected_.begin() + static_cast<long>(from), expected_.end(), 0);
  CheckAll("grown again");
}

void Memory::Lap(uint64_t turn, uint64_t of, bool give_back) {
  uint64_t random = next_.fetch_add(1) * 0x9e3779b97f4a7c15u;
  for (uint64_t page = turn; page < pages(); page += of) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    Check(page, "while it ran");
    if (give_back && (random >> 40) % 16 == 0) {
      GiveBack(page, 1, MADV_DONTNEED);
      Check(page, "after MADV_DONTNEED");
    } else if ((random >> 33) % 4 == 0) {
      Write(page);
    }
  }
  signals_.laps.fetch_add(1);
}

}  // namespace unmoor::testing_agent
