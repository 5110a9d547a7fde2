/* The C API as a C11 program sees it; driven by c_api_test.cpp. Each function returns null, or what
 * went wrong. */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include <string.h>
#include <sys/mman.h>

#include "c_api_calls.h"
#include "unmoor/c/unmoor.h"

#define CHECK(condition) \
  if (!(condition)) return #condition
#define OK(call) \
  if ((call) != UNMOOR_OK) return g_message[0] != 0 ? strcpy(g_text, g_message) : #call

static char g_text[1024];
static unmoor_error g_error = UNMOOR_ERROR_INIT;
#define g_message g_error.message

enum { kPages = 64, kPage = 4096 };

static int FillPages(void* context, uint64_t address, void* pages, size_t length) {
  (void)context;
  (void)address;
  memset(pages, 7, length);
  return 0;
}

static int RefusePages(void* context, uint64_t address, void* pages, size_t length) {
  (void)address;
  (void)pages;
  (void)length;
  return *(int*)context;
}

static const char* WriteTwo(const char* first, const char* second, char* heap) {
  unmoor_writer* writer = NULL;
  unmoor_report report = UNMOOR_REPORT_INIT;
  OK(unmoor_writer_create(first, 0, &writer, &g_error));
  OK(unmoor_writer_add(writer, (unmoor_memory){heap, kPages * kPage}, &g_error));
  OK(unmoor_writer_add_source(writer, 0x10000000, 4 * kPage, PROT_READ, FillPages, NULL, &g_error));
  OK(unmoor_writer_set_user_data(writer, "roots", 5, &g_error));
  OK(unmoor_writer_publish(writer, &report, &g_error));
  unmoor_writer_destroy(writer);
  CHECK(report.written_bytes == (1 + 4) * kPage && strlen(report.id) == 32 && !report.delta);

  unmoor_image* image = NULL;
  OK(unmoor_image_open(first, 0, &image, &g_error));
  CHECK(strcmp(unmoor_image_id(image), report.id) == 0);
  unmoor_checkpoint_options options = UNMOOR_CHECKPOINT_OPTIONS_INIT;
  options.base = image;
  options.flags = UNMOOR_WRITE_NO_SYNC;
  heap[9 * kPage] = 1;
  OK(unmoor_checkpoint(&(unmoor_memory){heap, kPages * kPage}, 1, second, &options, &report,
                       &g_error));
  CHECK(report.delta && report.written_bytes == kPage && report.shared_bytes == kPage);
  unmoor_image_close(image);
  return NULL;
}

const char* CApiRoundTrip(const char* first, const char* second) {
  char* heap =
      mmap(NULL, kPages * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(heap != MAP_FAILED);
  memset(heap, 5, kPage);
  const char* problem = WriteTwo(first, second, heap);
  if (problem != NULL) return problem;

  unmoor_image* image = NULL;
  unmoor_map* map = NULL;
  unmoor_image_range range = UNMOOR_IMAGE_RANGE_INIT;
  unmoor_mapped_range mapped = UNMOOR_MAPPED_RANGE_INIT;
  size_t length = 0;
  OK(unmoor_image_open(first, UNMOOR_OPEN_ANY_CPU, &image, &g_error));
  CHECK(memcmp(unmoor_image_user_data(image, &length), "roots", 5) == 0 && length == 5);
  CHECK(unmoor_image_range_count(image) == 2);
  OK(unmoor_image_range_at(image, 0, &range, &g_error));
  CHECK(range.address == 0x10000000 && range.protection == PROT_READ);
  CHECK(unmoor_image_range_at(image, 2, &range, NULL) == UNMOOR_INVALID_ARGUMENT);
  unmoor_image_close(image);
  OK(unmoor_image_open(second, 0, &image, &g_error));
  CHECK(strlen(unmoor_image_parent_id(image)) == 32);
  OK(unmoor_image_verify(image, &g_error));
  CHECK(unmoor_map_create(image, 0, &map, &g_error) == UNMOOR_BUSY && g_error.code == UNMOOR_BUSY);
  OK(unmoor_map_create(image, UNMOOR_MAP_ANYWHERE, &map, &g_error));
  unmoor_image_close(image);
  CHECK(unmoor_map_range_count(map) == 1);
  OK(unmoor_map_range_at(map, 0, &mapped, &g_error));
  CHECK(mapped.recorded_address == (uint64_t)(uintptr_t)heap && mapped.memory.begin != heap);
  CHECK(memcmp(mapped.memory.begin, heap, kPages * kPage) == 0);
  CHECK(unmoor_map_find(map, mapped.recorded_address + 5) == (char*)mapped.memory.begin + 5);
  unmoor_map_destroy(map);
  munmap(heap, kPages * kPage);
  return NULL;
}

const char* CApiVersions(const char* dir) {
  char page[2 * kPage];
  const unmoor_memory memory = {(void*)(((uintptr_t)page + kPage - 1) / kPage * kPage), kPage};
  /* A caller of a later version: what it adds must be zero. */
  struct {
    unmoor_checkpoint_options known;
    uint64_t later;
  } options = {UNMOOR_CHECKPOINT_OPTIONS_INIT, 0};
  options.known.size = sizeof options;
  options.later = 1;
  memset(page, 1, sizeof page);
  CHECK(unmoor_checkpoint(&memory, 1, dir, &options.known, NULL, &g_error) == UNMOOR_UNSUPPORTED);
  options.later = 0;
  /* A caller of an earlier version, whose report ends with the id. */
  unmoor_report report;
  memset(&report, 0x5a, sizeof report);
  report.size = offsetof(unmoor_report, delta);
  OK(unmoor_checkpoint(&memory, 1, dir, &options.known, &report, &g_error));
  CHECK(strlen(report.id) == 32 && report.delta == 0x5a5a5a5a);
  /* A short message buffer. */
  unmoor_error error = UNMOOR_ERROR_INIT;
  error.size = offsetof(unmoor_error, message);
  CHECK(unmoor_checkpoint(&memory, 1, dir, NULL, NULL, &error) == UNMOOR_INVALID_ARGUMENT);
  CHECK(error.code == UNMOOR_INVALID_ARGUMENT && error.message[0] == 0);
  return NULL;
}

#define REFUSED(call) CHECK((call) == UNMOOR_INVALID_ARGUMENT && g_message[0] != 0)

static const char* MapAndTrackMistakes(const unmoor_image* image, const unmoor_map* map,
                                       unmoor_memory memory) {
  unmoor_map* other = NULL;
  unmoor_tracker* tracker = NULL;
  const unmoor_memory unaligned = {(char*)memory.begin + 8, memory.length};
  const unmoor_memory overlapping[2] = {memory, memory};
  REFUSED(unmoor_map_create(NULL, 0, &other, &g_error));
  REFUSED(unmoor_map_create(image, 0, NULL, &g_error));
  CHECK(unmoor_map_create(image, 64, &other, &g_error) == UNMOOR_UNSUPPORTED);
  CHECK(unmoor_map_find(map, 1) == NULL);
  REFUSED(unmoor_tracker_start(&memory, 1, NULL, &g_error));
  REFUSED(unmoor_tracker_start(NULL, 1, &tracker, &g_error));
  REFUSED(unmoor_tracker_start(&unaligned, 1, &tracker, &g_error));
  REFUSED(unmoor_tracker_start(overlapping, 2, &tracker, &g_error));
  REFUSED(unmoor_tracker_changed(NULL, NULL, NULL, &g_error));
  REFUSED(unmoor_tracker_reset(NULL, NULL, NULL, &g_error));
  return other == NULL && tracker == NULL ? NULL : "an object of a call that failed";
}

static const char* RemapMistakes(const unmoor_map* map, unmoor_memory memory) {
  unmoor_remapper* remapper = NULL;
  unmoor_remap_options options = UNMOOR_REMAP_OPTIONS_INIT;
  unmoor_remap_range ranges[2] = {{memory, 0}, {memory, 0}};
  REFUSED(unmoor_remapper_start(NULL, NULL, &remapper, &g_error));
  REFUSED(unmoor_remapper_start(map, NULL, NULL, &g_error));
  REFUSED(unmoor_remapper_start_ranges(map, NULL, 1, NULL, &remapper, &g_error));
  REFUSED(unmoor_remapper_start_ranges(map, ranges, 2, NULL, &remapper, &g_error));
  ranges[0].memory.length += 8;
  REFUSED(unmoor_remapper_start_ranges(NULL, ranges, 1, NULL, &remapper, &g_error));
  options.threads = -1;
  REFUSED(unmoor_remapper_start(map, &options, &remapper, &g_error));
  options.threads = 0;
  options.cpu_share = 2.0;
  REFUSED(unmoor_remapper_start(map, &options, &remapper, &g_error));
  options.cpu_share = 0;
  options.guard = 7;
  REFUSED(unmoor_remapper_start(map, &options, &remapper, &g_error));
  options.guard = 0;
  options.order = 7;
  REFUSED(unmoor_remapper_start(map, &options, &remapper, &g_error));
  options.order = 0;
  options.flags = 1u << 20;
  CHECK(unmoor_remapper_start(map, &options, &remapper, &g_error) == UNMOOR_UNSUPPORTED);
  options.size = 0;
  REFUSED(unmoor_remapper_start(map, &options, &remapper, &g_error));
  REFUSED(unmoor_remapper_progress(NULL, NULL, &g_error));
  REFUSED(unmoor_remapper_wait(NULL, 0, &g_error));
  REFUSED(unmoor_query_status(NULL, &g_error));
  unmoor_remapper_destroy(NULL);
  unmoor_tracker_destroy(NULL);
  return remapper == NULL ? NULL : "an object of a call that failed";
}

/* Every other entry with what it must not be given. `dir` gets an image. */
const char* CApiBadInput(const char* dir) {
  unmoor_image* image = NULL;
  unmoor_map* map = NULL;
  unmoor_mapped_range mapped = UNMOOR_MAPPED_RANGE_INIT;
  char* heap =
      mmap(NULL, kPages * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(heap != MAP_FAILED);
  const unmoor_memory memory = {heap, kPages * kPage};
  heap[0] = 1;
  REFUSED(unmoor_checkpoint(NULL, 1, dir, NULL, NULL, &g_error));
  REFUSED(unmoor_checkpoint(&memory, 1, NULL, NULL, NULL, &g_error));
  REFUSED(unmoor_image_open(NULL, 0, &image, &g_error));
  REFUSED(unmoor_image_verify(NULL, &g_error));
  OK(unmoor_checkpoint(&memory, 1, dir, NULL, NULL, &g_error));
  OK(unmoor_image_open(dir, 0, &image, &g_error));
  OK(unmoor_map_create(image, UNMOOR_MAP_ANYWHERE, &map, &g_error));
  OK(unmoor_map_range_at(map, 0, &mapped, &g_error));
  const char* problem = MapAndTrackMistakes(image, map, mapped.memory);
  if (problem == NULL) problem = RemapMistakes(map, mapped.memory);
  unmoor_map_destroy(map);
  unmoor_image_close(image);
  munmap(heap, kPages * kPage);
  return problem;
}

const char* CApiMistakes(const char* dir) {
  unmoor_writer* writer = NULL;
  CHECK(unmoor_writer_create(NULL, 0, &writer, &g_error) == UNMOOR_INVALID_ARGUMENT);
  CHECK(unmoor_writer_create(dir, 64, &writer, &g_error) == UNMOOR_UNSUPPORTED);
  OK(unmoor_writer_create(dir, 0, &writer, &g_error));
  int answer = 3;
  OK(unmoor_writer_add_source(writer, 0x1000, kPage, PROT_READ, RefusePages, &answer, &g_error));
  CHECK(unmoor_writer_publish(writer, NULL, &g_error) == UNMOOR_CANCELLED);
  CHECK(strstr(g_error.message, "3") != NULL);
  unmoor_writer_destroy(writer);
  unmoor_writer_destroy(NULL);
  unmoor_image_close(NULL);
  unmoor_map_destroy(NULL);
  unmoor_map_release(NULL);
  unmoor_memory_free(NULL);
  CHECK(unmoor_version()[0] != 0);
  return NULL;
}
