// Memory as an image, mapped, written while it is remapped, and made into an image again.
// Build: g++ -std=c++20 remap.cpp $(pkg-config --cflags --libs unmoor)
#include <sys/mman.h>
#include <unmoor/background_remapper.h>
#include <unmoor/checkpoint.h>
#include <unmoor/direct_map.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <numeric>

template <class T>
T Must(unmoor::StatusOr<T> result) {
  if (result.ok()) return std::move(*result);
  std::fprintf(stderr, "%s\n", result.status().message().c_str());
  std::exit(1);
}

int main(int argc, char** argv) {
  if (argc != 2) return 2;  // the directory in which the two images are made
  const std::string first = std::string(argv[1]) + "/first",
                    second = std::string(argv[1]) + "/second";
  constexpr size_t kSize = 64 << 20, kWords = kSize / sizeof(uint64_t);
  void* const at = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto* const heap = static_cast<uint64_t*>(at);
  const unmoor::MemoryRange memory[] = {{at, kSize}};
  std::iota(heap, heap + kWords, 0);
  Must(unmoor::Checkpoint(memory, first));  // a full image
  munmap(at, kSize);

  auto image = Must(unmoor::PageImage::Open(first));
  auto map = Must(unmoor::DirectMap::Map(image));  // back at its address; nothing was read
  auto remapper = Must(unmoor::BackgroundRemapper::Start(map));
  size_t next = 0;  // use the memory meanwhile
  while (remapper.progress().running) ++heap[next++ * 4099 % kWords];
  if (!remapper.Wait().ok()) return 1;

  unmoor::CheckpointOptions options;
  options.base = &image;  // only what changed is written
  const auto report = Must(unmoor::Checkpoint(memory, second, options));
  const uint64_t sum = std::accumulate(heap, heap + kWords, uint64_t{0});
  std::filesystem::remove_all(first);  // the second needs nothing of it
  if (!map.Unmap().ok()) return 1;
  auto again = Must(unmoor::DirectMap::Map(Must(unmoor::PageImage::Open(second))));
  const bool equal = std::accumulate(heap, heap + kWords, uint64_t{0}) == sum;
  std::printf("%zu writes during the remap, %llu KiB written, %s\n", next,
              report.written_bytes / 1024ull, equal ? "equal" : "WRONG");
  return equal ? 0 : 1;
}
