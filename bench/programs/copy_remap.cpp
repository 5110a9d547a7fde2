// The measure of the remap: the best loop one thread can do, for one block of 2 MiB after another:
// copy from a cached private file mapping into anonymous memory, mremap that over the mapping.
//
// Four ways to get the memory (A, B, C and G, below), and a memcpy with both sides warm as the
// limit. Each runs on a mapping of its own, is verified byte for byte, and prints one JSON line.
// The order is shuffled by the seed. Memory of the guest that the host has not backed yet is
// touched once first, so that no way pays for another's first touch.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "os/kernel_abi.h"

namespace {

constexpr size_t kBlock = 2 << 20;
constexpr size_t kPage = 4096;
constexpr int kCollapse = 25;  // MADV_COLLAPSE

[[noreturn]] void Die(const char* what) {
  std::fprintf(stderr, "copy_remap: %s: %s\n", what, std::strerror(errno));
  std::exit(1);
}

double Now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

// Address space whose begin is a multiple of 2 MiB.
char* Reserve(size_t size) {
  void* found = mmap(nullptr, size + kBlock, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) Die("reserving addresses");
  const auto address = reinterpret_cast<uintptr_t>(found);
  return reinterpret_cast<char*>((address + kBlock - 1) & ~(kBlock - 1));
}

// SAFETY: only over what Reserve() returned.
char* MapAt(char* at, size_t size, int flags, int fd) {
  if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | flags, fd, 0) ==
      MAP_FAILED) {
    Die("mapping");
  }
  return at;
}

void Advise(char* at, size_t size, int advice) {
  if (madvise(at, size, advice) != 0) Die("madvise");
}

void MoveOver(char* from, char* to) {
  if (mremap(from, kBlock, kBlock, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED) Die("mremap");
}

struct Job {
  char* mapping;  // the file, private
  char* staging;  // as large, anonymous, untouched
  size_t size;
};

// A: the staging asks for huge pages. Fast, but leaves the VMA with a flag it did not have.
void RemapAdvised(const Job& job) {
  Advise(job.staging, job.size, MADV_HUGEPAGE);
  for (size_t at = 0; at < job.size; at += kBlock) {
    std::memcpy(job.staging + at, job.mapping + at, kBlock);
    MoveOver(job.staging + at, job.mapping + at);
  }
}

// B: small pages.
void RemapSmall(const Job& job) {
  for (size_t at = 0; at < job.size; at += kBlock) {
    Advise(job.staging + at, kBlock, MADV_POPULATE_WRITE);
    std::memcpy(job.staging + at, job.mapping + at, kBlock);
    MoveOver(job.staging + at, job.mapping + at);
  }
}

// C: a touched page, collapsed into a huge one.
void RemapCollapsed(const Job& job) {
  for (size_t at = 0; at < job.size; at += kBlock) {
    job.staging[at] = 1;
    Advise(job.staging + at, kBlock, kCollapse);
    std::memcpy(job.staging + at, job.mapping + at, kBlock);
    MoveOver(job.staging + at, job.mapping + at);
  }
}

int OpenUffd() {
  const auto fd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC));
  if (fd < 0) return -1;
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = unmoor::kernel::kUffdFeatureMove;
  if (ioctl(fd, UFFDIO_API, &api) == 0) return fd;
  close(fd);
  return -1;
}

// G: huge pages made in one scratch block, moved into the unflagged staging page table by page
// table.
void RemapMoved(const Job& job, int uffd) {
  char* const scratch = MapAt(Reserve(kBlock), kBlock, MAP_ANONYMOUS, -1);
  Advise(scratch, kBlock, MADV_HUGEPAGE);
  const auto staging = reinterpret_cast<uint64_t>(job.staging);
  uffdio_register whole{{staging, job.size}, UFFDIO_REGISTER_MODE_MISSING, 0};
  if (ioctl(uffd, UFFDIO_REGISTER, &whole) != 0) Die("UFFDIO_REGISTER");
  for (size_t at = 0; at < job.size; at += kBlock) {
    std::memcpy(scratch, job.mapping + at, kBlock);
    uint64_t move[5] = {staging + at, reinterpret_cast<uint64_t>(scratch), kBlock, 0, 0};
    if (ioctl(uffd, UFFDIO_MOVE, move) != 0) Die("UFFDIO_MOVE");
    uffdio_range block{staging + at, kBlock};
    if (ioctl(uffd, UFFDIO_UNREGISTER, &block) != 0) Die("UFFDIO_UNREGISTER");
    MoveOver(job.staging + at, job.mapping + at);
  }
  munmap(scratch, kBlock);
}

uint64_t WordOf(size_t index) {
  return (index + 1) * 0x9E3779B97F4A7C15u;
}

bool IsRight(const char* memory, size_t size) {
  const auto* words = reinterpret_cast<const uint64_t*>(memory);
  for (size_t i = 0; i < size / sizeof *words; ++i) {
    if (words[i] != WordOf(i)) return false;
  }
  return true;
}

int MakeFile(const char* path, size_t size) {
  const int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) Die(path);
  std::vector<uint64_t> block(kBlock / sizeof(uint64_t));
  for (size_t at = 0; at < size; at += kBlock) {
    for (size_t i = 0; i < block.size(); ++i) block[i] = WordOf(at / sizeof(uint64_t) + i);
    if (write(fd, block.data(), kBlock) != static_cast<ssize_t>(kBlock)) Die(path);
  }
  return fd;
}

// VMAs that lie in the range, and bytes of it in huge pages.
void Shape(const char* begin, size_t size, int& vmas, size_t& huge) {
  std::ifstream smaps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    unsigned long from = 0;
    unsigned long to = 0;
    if (line.find(':') > line.find('-') && std::sscanf(line.c_str(), "%lx-%lx ", &from, &to) == 2) {
      const auto low = reinterpret_cast<uintptr_t>(begin);
      inside = from < low + size && to > low;
      vmas += inside;
    } else if (inside && line.starts_with("AnonHugePages:")) {
      huge += std::strtoull(line.c_str() + 14, nullptr, 10) << 10;
    }
  }
}

void WarmGuest(size_t size) {
  char* const memory = MapAt(Reserve(size), size, MAP_ANONYMOUS, -1);
  Advise(memory, size, MADV_HUGEPAGE);
  for (size_t at = 0; at < size; at += kPage) memory[at] = 1;
  munmap(memory, size);
}

void MeasureMemcpy(size_t size) {
  char* const from = MapAt(Reserve(size), size, MAP_ANONYMOUS, -1);
  char* const to = MapAt(Reserve(size), size, MAP_ANONYMOUS, -1);
  for (char* memory : {from, to}) {
    Advise(memory, size, MADV_HUGEPAGE);
    std::memset(memory, 1, size);
  }
  const double began = Now();
  std::memcpy(to, from, size);
  const double seconds = Now() - began;
  std::printf("{\"variant\": \"memcpy\", \"bytes\": %zu, \"seconds\": %.6f, \"verified\": %s}\n",
              size, seconds, std::memcmp(from, to, size) == 0 ? "true" : "false");
  munmap(from, size);
  munmap(to, size);
}

void Measure(char variant, int file, size_t size, int uffd) {
  const Job job{MapAt(Reserve(size), size, 0, file), MapAt(Reserve(size), size, MAP_ANONYMOUS, -1),
                size};
  const double began = Now();
  if (variant == 'A') RemapAdvised(job);
  if (variant == 'B') RemapSmall(job);
  if (variant == 'C') RemapCollapsed(job);
  if (variant == 'G') RemapMoved(job, uffd);
  const double seconds = Now() - began;
  int vmas = 0;
  size_t huge = 0;
  Shape(job.mapping, size, vmas, huge);
  std::printf(
      "{\"variant\": \"%c\", \"bytes\": %zu, \"seconds\": %.6f, \"vmas\": %d, "
      "\"huge_bytes\": %zu, \"verified\": %s}\n",
      variant, size, seconds, vmas, huge, IsRight(job.mapping, size) ? "true" : "false");
  munmap(job.mapping, size);
  munmap(job.staging, size);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fputs("usage: bench_copy_remap FILE MIB SEED\nFILE is made, and left\n", stderr);
    return 2;
  }
  const size_t size = std::strtoull(argv[2], nullptr, 10) << 20;
  if (size == 0 || size % kBlock != 0) return 2;
  const int file = MakeFile(argv[1], size);
  WarmGuest(2 * size);
  const int uffd = OpenUffd();
  std::string variants = uffd < 0 ? "ABCm" : "ABCGm";
  std::mt19937 random(static_cast<unsigned>(std::strtoul(argv[3], nullptr, 10)));
  std::shuffle(variants.begin(), variants.end(), random);
  for (const char variant : variants) {
    if (variant == 'm') {
      MeasureMemcpy(size);
    } else {
      Measure(variant, file, size, uffd);
    }
    std::fflush(stdout);
  }
  return 0;
}
