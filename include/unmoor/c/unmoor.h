/* The C API of libunmoor: images of memory, direct maps, background remap, dirty tracking.
 *
 * It is the C++ API (unmoor/page_image.h and its neighbours, which say what everything means) in C,
 * with a stable ABI:
 *
 *  - Objects are opaque pointers, made by …_create, …_open or …_start, ended by one function that
 *    takes null as well.
 *  - Structs begin with their own size: initialise them with the macro of the same name
 *    (UNMOOR_REPORT_INIT …). A library that knows more members than the caller leaves those out;
 * one that knows fewer refuses members it does not know unless they are zero. Zero always means the
 *    default.
 *  - Functions return UNMOOR_OK or another code, and fill `error` when it is not null. Nothing
 *    throws, nothing is printed. Pointers returned by …_id and the like belong to the object.
 */
#ifndef UNMOOR_C_UNMOOR_H
#define UNMOOR_C_UNMOOR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* --- Errors --------------------------------------------------------------------------------- */

#define UNMOOR_OK 0
#define UNMOOR_INVALID_ARGUMENT 1 /* the caller's mistake */
#define UNMOOR_NOT_FOUND 2        /* no image there */
#define UNMOOR_DAMAGED 3          /* an image that is incomplete, truncated or changed */
#define UNMOOR_UNSUPPORTED 4      /* another format, machine, or a kernel without the feature */
#define UNMOOR_BUSY 5             /* an address, a range or a directory is in use */
#define UNMOOR_NO_MEMORY 6
#define UNMOOR_TIMED_OUT 7
#define UNMOOR_CANCELLED 8
#define UNMOOR_SYSTEM 9 /* a system call failed: see errnum */

typedef struct unmoor_error {
  size_t size;
  int32_t code;
  int32_t errnum;     /* 0: none */
  char message[1024]; /* one line, cut off where it is longer */
} unmoor_error;
#define UNMOOR_ERROR_INIT {sizeof(unmoor_error), 0, 0, {0}}

/* "0.1.0": of the library that is loaded. */
const char* unmoor_version(void);

/* Memory of this process. Never gets more members. */
typedef struct unmoor_memory {
  void* begin;
  size_t length;
} unmoor_memory;

/* --- Writing an image ------------------------------------------------------------------------ */

typedef struct unmoor_report {
  size_t size;
  char id[33];
  int32_t delta;
  uint64_t address_bytes;
  uint64_t written_bytes;
  uint64_t shared_bytes;
} unmoor_report;
#define UNMOOR_REPORT_INIT {sizeof(unmoor_report), {0}, 0, 0, 0, 0}

#define UNMOOR_WRITE_REPLACE 1u /* replace an image that is there */
#define UNMOOR_WRITE_NO_SYNC 2u /* do not wait for the disk */

typedef struct unmoor_writer unmoor_writer;
/* Fills `pages`; returns 0, or not 0 to end the publication with UNMOOR_CANCELLED. */
typedef int (*unmoor_page_source)(void* context, uint64_t address, void* pages, size_t length);

int unmoor_writer_create(const char* dir, uint32_t flags, unmoor_writer** writer,
                         unmoor_error* error);
int unmoor_writer_add(unmoor_writer* writer, unmoor_memory memory, unmoor_error* error);
int unmoor_writer_add_source(unmoor_writer* writer, uint64_t address, uint64_t length,
                             int protection, unmoor_page_source source, void* context,
                             unmoor_error* error);
int unmoor_writer_set_user_data(unmoor_writer* writer, const void* data, size_t length,
                                unmoor_error* error);
int unmoor_writer_publish(unmoor_writer* writer, unmoor_report* report, unmoor_error* error);
void unmoor_writer_destroy(unmoor_writer* writer);

/* --- An image -------------------------------------------------------------------------------- */

#define UNMOOR_OPEN_ANY_CPU 1u /* also an image of a CPU with features this one lacks */

typedef struct unmoor_image unmoor_image;

typedef struct unmoor_image_range {
  size_t size;
  uint64_t address;
  uint64_t length;
  int32_t protection;
  uint64_t data_bytes;
} unmoor_image_range;
#define UNMOOR_IMAGE_RANGE_INIT {sizeof(unmoor_image_range), 0, 0, 0, 0}

int unmoor_image_open(const char* dir, uint32_t flags, unmoor_image** image, unmoor_error* error);
const char* unmoor_image_directory(const unmoor_image* image);
const char* unmoor_image_id(const unmoor_image* image);
const char* unmoor_image_parent_id(const unmoor_image* image); /* "": none */
const void* unmoor_image_user_data(const unmoor_image* image, size_t* length);
size_t unmoor_image_range_count(const unmoor_image* image);
int unmoor_image_range_at(const unmoor_image* image, size_t index, unmoor_image_range* range,
                          unmoor_error* error);
int unmoor_image_verify(const unmoor_image* image, unmoor_error* error);
void unmoor_image_close(unmoor_image* image);

/* --- Mapping it ------------------------------------------------------------------------------ */

#define UNMOOR_MAP_ANYWHERE 1u /* not at the recorded addresses */

typedef struct unmoor_map unmoor_map;

typedef struct unmoor_mapped_range {
  size_t size;
  uint64_t recorded_address;
  unmoor_memory memory;
  int32_t protection;
} unmoor_mapped_range;
#define UNMOOR_MAPPED_RANGE_INIT {sizeof(unmoor_mapped_range), 0, {NULL, 0}, 0}

int unmoor_map_create(const unmoor_image* image, uint32_t flags, unmoor_map** map,
                      unmoor_error* error);
size_t unmoor_map_range_count(const unmoor_map* map);
int unmoor_map_range_at(const unmoor_map* map, size_t index, unmoor_mapped_range* range,
                        unmoor_error* error);
void* unmoor_map_find(const unmoor_map* map, uint64_t recorded_address);
/* Unmaps the memory. */
void unmoor_map_destroy(unmoor_map* map);
/* Leaves the memory to the program; the map is gone. */
void unmoor_map_release(unmoor_map* map);

/* --- What changed ---------------------------------------------------------------------------- */

#define UNMOOR_MECHANISM_WRITE_PROTECT 0
#define UNMOOR_MECHANISM_MPROTECT 1

typedef struct unmoor_tracker unmoor_tracker;

int unmoor_tracker_start(const unmoor_memory* ranges, size_t count, unmoor_tracker** tracker,
                         unmoor_error* error);
/* `*changed` is to be freed by unmoor_memory_free. */
int unmoor_tracker_changed(const unmoor_tracker* tracker, unmoor_memory** changed, size_t* count,
                           unmoor_error* error);
/* A new baseline. `changed` and `count` may both be null. */
int unmoor_tracker_reset(unmoor_tracker* tracker, unmoor_memory** changed, size_t* count,
                         unmoor_error* error);
int unmoor_tracker_mechanism(const unmoor_tracker* tracker);
void unmoor_tracker_destroy(unmoor_tracker* tracker);
void unmoor_memory_free(unmoor_memory* ranges);

/* --- Moving it to anonymous memory ----------------------------------------------------------- */

#define UNMOOR_NEVER 0
#define UNMOOR_LATER 1
#define UNMOOR_READY 2

#define UNMOOR_GUARD_FREEZE 0
#define UNMOOR_GUARD_FAULT 1

#define UNMOOR_ORDER_GIVEN 0
#define UNMOOR_ORDER_SEQUENTIAL 1
#define UNMOOR_ORDER_HOT_FIRST 2

#define UNMOOR_REMAP_NO_HUGE_PAGES 1u
#define UNMOOR_REMAP_NO_VERIFY 2u
#define UNMOOR_REMAP_EVENTFD 4u /* completion_eventfd is meant */

typedef struct unmoor_remapper unmoor_remapper;

typedef struct unmoor_remap_options {
  size_t size;
  uint32_t flags;
  int32_t threads;           /* 0: 1 */
  uint64_t bytes_per_second; /* 0: as fast as it goes */
  double cpu_share;          /* 0: 1.0 */
  int32_t guard;
  int32_t order;
  uint64_t max_pause_ns; /* 0: 1 ms */
  int32_t freeze_signal; /* 0: one the C library keeps to itself */
  int32_t completion_eventfd;
  void (*on_complete)(void* context, int status);
  void* context;
  unmoor_tracker* tracker;
} unmoor_remap_options;
#define UNMOOR_REMAP_OPTIONS_INIT \
  {sizeof(unmoor_remap_options), 0, 0, 0, 0.0, 0, 0, 0, 0, 0, NULL, NULL, NULL}

/* Never gets more members. */
typedef struct unmoor_remap_range {
  unmoor_memory memory;
  int32_t no_system_call_writes; /* not 0: the promise that UNMOOR_GUARD_FAULT needs */
} unmoor_remap_range;

typedef struct unmoor_progress {
  size_t size;
  int32_t status;
  int32_t running;
  uint64_t total_bytes;
  uint64_t done_bytes;
  uint64_t refused_bytes;
  uint64_t windows;
  uint64_t aborted;
  uint64_t faults_caught;
  uint64_t longest_pause_ns;
  uint64_t longest_guard_ns;
  uint64_t writers_waited_ns;
  char reason[512];
} unmoor_progress;
#define UNMOOR_PROGRESS_INIT {sizeof(unmoor_progress), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {0}}

/* `options` may be null. */
int unmoor_remapper_start(const unmoor_map* map, const unmoor_remap_options* options,
                          unmoor_remapper** remapper, unmoor_error* error);
/* Chosen ranges: of `map`, or, when it is null, of whatever this process has mapped. */
int unmoor_remapper_start_ranges(const unmoor_map* map, const unmoor_remap_range* ranges,
                                 size_t count, const unmoor_remap_options* options,
                                 unmoor_remapper** remapper, unmoor_error* error);
int unmoor_remapper_progress(const unmoor_remapper* remapper, unmoor_progress* progress,
                             unmoor_error* error);
/* Negative: without end. */
int unmoor_remapper_wait(unmoor_remapper* remapper, int64_t timeout_ns, unmoor_error* error);
void unmoor_remapper_pause(unmoor_remapper* remapper);
void unmoor_remapper_resume(unmoor_remapper* remapper);
void unmoor_remapper_finish_now(unmoor_remapper* remapper);
void unmoor_remapper_cancel(unmoor_remapper* remapper);
void unmoor_remapper_destroy(unmoor_remapper* remapper);

typedef struct unmoor_process_status {
  size_t size;
  int32_t status;
  uint64_t direct_mapped_bytes;
  char reason[512];
} unmoor_process_status;
#define UNMOOR_PROCESS_STATUS_INIT {sizeof(unmoor_process_status), 0, 0, {0}}

int unmoor_query_status(unmoor_process_status* status, unmoor_error* error);

/* --- The next image -------------------------------------------------------------------------- */

typedef struct unmoor_checkpoint_options {
  size_t size;
  uint32_t flags;           /* UNMOOR_WRITE_… */
  const unmoor_image* base; /* null: a full image */
  unmoor_tracker* tracker;  /* null: every page is compared */
  const void* user_data;
  size_t user_data_length;
} unmoor_checkpoint_options;
#define UNMOOR_CHECKPOINT_OPTIONS_INIT {sizeof(unmoor_checkpoint_options), 0, NULL, NULL, NULL, 0}

/* `options` and `report` may be null. */
int unmoor_checkpoint(const unmoor_memory* ranges, size_t count, const char* dir,
                      const unmoor_checkpoint_options* options, unmoor_report* report,
                      unmoor_error* error);

#ifdef __cplusplus
}
#endif

#endif
