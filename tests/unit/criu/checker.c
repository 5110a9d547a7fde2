/* The program of criu_end_to_end_test: checks its own memory without pause and says so.
 *
 *   checker MIB BEAT_FILE [threads|tree|madvise|guard]
 *
 * Fills MIB of anonymous memory with a pattern, then verifies all of it again and again. BEAT_FILE is
 * mapped shared; beat[0] counts rounds, beat[1] wrong words, beat[2] is the address of the memory.
 * A second process or thread (modes tree, threads) counts in beat[3] and beat[4]. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static volatile uint64_t *beat;
static uint64_t *words;
static size_t count;
static uint64_t salt;

static uint64_t Pattern(size_t i) { return (i + salt) * 0x9E3779B97F4A7C15u; }

static void Verify(int counter) {
  for (size_t i = 0; i < count; i += 64) {
    /* Page 5 is never touched, page 6 is all zero. */
    const size_t page = i / 512;
    const uint64_t expected = page == 5 || page == 6 ? 0 : Pattern(i);
    if (page != 5 && words[i] != expected) beat[counter + 1]++;
  }
  beat[counter]++;
}

static void *VerifyForEver(void *counter) {
  for (;;) {
    Verify((int)(intptr_t)counter);
    usleep(2000);
  }
  return 0;
}

int main(int argc, char **argv) {
  if (argc < 3) return 2;
  const char *const mode = argc > 3 ? argv[3] : "";
  const size_t size = (size_t)atol(argv[1]) << 20;
  const int fd = open(argv[2], O_RDWR);
  beat = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  words = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (beat == MAP_FAILED || words == MAP_FAILED) return 2;
  if (strcmp(mode, "madvise") == 0) {
    madvise(words, size, MADV_HUGEPAGE);
    madvise(words, size, MADV_DONTDUMP);
    madvise(words, size, MADV_DONTFORK);
    madvise(words, size, MADV_MERGEABLE);
    madvise(words, size, MADV_RANDOM);
  }
  count = size / sizeof *words;
  for (size_t i = 0; i < count; ++i) {
    const size_t page = i / 512;
    if (page == 5) continue;
    words[i] = page == 6 ? 0 : Pattern(i);
  }
  if (strcmp(mode, "guard") == 0) madvise(words + 5 * 512, 4096, 102 /* MADV_GUARD_INSTALL */);
  beat[2] = (uint64_t)(uintptr_t)words;
  if (strcmp(mode, "threads") == 0) {
    for (int t = 0; t < 3; ++t) {
      pthread_t thread;
      pthread_create(&thread, 0, VerifyForEver, (void *)(intptr_t)3);
    }
  }
  if (strcmp(mode, "tree") == 0 && fork() == 0) {
    salt = 77;
    for (size_t i = 0; i < count; ++i) {
      const size_t page = i / 512;
      if (page != 5 && page != 6) words[i] = Pattern(i);
    }
    VerifyForEver((void *)(intptr_t)3);
  }
  VerifyForEver(0);
}
