/* Memory as an image, mapped, written while it is remapped, and made into an image again.
 * Build: gcc -std=c11 remap.c $(pkg-config --cflags --libs unmoor) */
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unmoor/c/unmoor.h>

static unmoor_error error = UNMOOR_ERROR_INIT;
static void Must(int code) {
  if (code == UNMOOR_OK) return;
  fprintf(stderr, "%s\n", error.message);
  exit(1);
}

int main(int argc, char** argv) {
  enum { kSize = 64 << 20, kWords = kSize / sizeof(uint64_t) };
  if (argc != 4) return 2; /* first image, second image, command that removes the first */
  uint64_t* const heap =
      mmap(NULL, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const unmoor_memory memory = {heap, kSize};
  for (size_t i = 0; i < kWords; ++i) heap[i] = i;
  Must(unmoor_checkpoint(&memory, 1, argv[1], NULL, NULL, &error)); /* a full image */
  munmap(memory.begin, kSize);

  unmoor_image *image, *next;
  unmoor_map* map;
  unmoor_remapper* remapper;
  unmoor_progress progress = UNMOOR_PROGRESS_INIT;
  Must(unmoor_image_open(argv[1], 0, &image, &error));
  Must(unmoor_map_create(image, 0, &map, &error)); /* back at its address; nothing was read */
  Must(unmoor_remapper_start(map, NULL, &remapper, &error));
  size_t writes = 0; /* use the memory meanwhile */
  do {
    for (int i = 0; i < 1000; ++i) heap[writes++ * 4099 % kWords] += 1;
    Must(unmoor_remapper_progress(remapper, &progress, &error));
  } while (progress.running);
  Must(unmoor_remapper_wait(remapper, -1, &error));
  unmoor_remapper_destroy(remapper);

  unmoor_checkpoint_options options = UNMOOR_CHECKPOINT_OPTIONS_INIT;
  unmoor_report report = UNMOOR_REPORT_INIT;
  options.base = image; /* only what changed is written */
  Must(unmoor_checkpoint(&memory, 1, argv[2], &options, &report, &error));
  uint64_t sum = 0;
  for (size_t i = 0; i < kWords; ++i) sum += heap[i] * i;
  unmoor_image_close(image);
  unmoor_map_destroy(map);
  if (system(argv[3]) != 0) return 1; /* the second image needs nothing of the first */

  Must(unmoor_image_open(argv[2], 0, &next, &error));
  Must(unmoor_map_create(next, 0, &map, &error));
  for (size_t i = 0; i < kWords; ++i) sum -= heap[i] * i;
  printf("%zu writes during the remap, %lu KiB written, %s\n", writes,
         (unsigned long)(report.written_bytes >> 10), sum == 0 ? "equal" : "WRONG");
  return sum == 0 ? 0 : 1;
}
