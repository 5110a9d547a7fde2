// The C API over the C++ one: see unmoor/c/unmoor.h.
//
// Structs cross by size: of what the caller gives only the members both know are taken, and what
// only the caller knows must be zero; of what is given back only the caller's size is written. No
// exception leaves (memory exhausted becomes a code).
#include "unmoor/c/unmoor.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>

#include "library/status_from.h"
#include "unmoor/background_remapper.h"
#include "unmoor/checkpoint.h"
#include "unmoor/direct_map.h"
#include "unmoor/dirty_tracker.h"
#include "unmoor/page_image.h"

struct unmoor_writer {
  unmoor::PageImageWriter value;
};
struct unmoor_image {
  unmoor::PageImage value;
};
struct unmoor_map {
  unmoor::DirectMap value;
};
struct unmoor_tracker {
  unmoor::DirtyTracker value;
};
struct unmoor_remapper {
  unmoor::BackgroundRemapper value;
};

namespace {

using unmoor::MakeStatus;
using unmoor::Status;
using unmoor::StatusCode;
using unmoor::StatusOr;

void CopyText(const std::string& from, char* to, size_t room) {
  const size_t n = std::min(from.size(), room - 1);
  std::memcpy(to, from.data(), n);
  to[n] = 0;
}

// `to` has the size its caller knows.
template <class T>
void GiveBack(const T& from, T* to) {
  if (to == nullptr) return;
  const size_t size = std::min(to->size, sizeof(T));
  if (size <= sizeof(size_t)) return;
  std::memcpy(reinterpret_cast<char*>(to) + sizeof(size_t),
              reinterpret_cast<const char*>(&from) + sizeof(size_t), size - sizeof(size_t));
}

// A struct that may be of an older or a newer caller.
template <class T>
Status Take(const T* from, T& to) {
  if (from == nullptr) return {};
  const auto* const bytes = reinterpret_cast<const char*>(from);
  if (from->size < sizeof(size_t)) {
    return MakeStatus(StatusCode::kInvalidArgument, "a struct whose size was not set");
  }
  for (size_t i = sizeof(T); i < from->size; ++i) {
    if (bytes[i] != 0) {
      return MakeStatus(StatusCode::kUnsupported,
                        "an option that this version of libunmoor does not know");
    }
  }
  std::memcpy(&to, bytes, std::min(from->size, sizeof(T)));
  return {};
}

// Runs `body`, which returns a Status, and tells `error` of it.
template <class Body>
int Answer(unmoor_error* error, Body body) {
  Status status;
  try {
    status = body();
  } catch (const std::bad_alloc&) {
    status = Status(StatusCode::kNoMemory, "memory exhausted");
  } catch (const std::exception& failure) {
    status = Status(StatusCode::kSystem, failure.what());
  }
  if (!status.ok() && error != nullptr) {
    unmoor_error filled = UNMOOR_ERROR_INIT;
    filled.code = static_cast<int32_t>(status.code());
    filled.errnum = status.errnum();
    CopyText(status.message(), filled.message, sizeof filled.message);
    GiveBack(filled, error);
  }
  return static_cast<int>(status.code());
}

// Puts a made object into the caller's pointer.
template <class Handle, class T>
Status Hand(StatusOr<T> made, Handle** to) {
  if (!made.ok()) return made.status();
  *to = new Handle{*std::move(made)};
  return {};
}

Status Missing(const char* what) {
  return MakeStatus(StatusCode::kInvalidArgument, "{} is null", what);
}

Status CheckFlags(uint32_t flags, uint32_t known) {
  if ((flags & ~known) == 0) return {};
  return MakeStatus(StatusCode::kUnsupported,
                    "flags {:#x} are not ones this version of libunmoor knows", flags & ~known);
}

#define UNMOOR_C_TRY(expression)                                    \
  do {                                                              \
    if (Status unmoor_status = (expression); !unmoor_status.ok()) { \
      return unmoor_status;                                         \
    }                                                               \
  } while (false)

std::vector<unmoor::MemoryRange> ToRanges(const unmoor_memory* ranges, size_t count) {
  std::vector<unmoor::MemoryRange> result;
  for (size_t i = 0; i < count; ++i) result.push_back({ranges[i].begin, ranges[i].length});
  return result;
}

// An array of the caller's; never null when it succeeds.
Status HandRanges(const StatusOr<std::vector<unmoor::MemoryRange>>& ranges, unmoor_memory** to,
                  size_t* count) {
  if (!ranges.ok()) return ranges.status();
  if (to == nullptr) return {};
  *to = new unmoor_memory[ranges->size() + 1];
  for (size_t i = 0; i < ranges->size(); ++i) {
    (*to)[i] = {(*ranges)[i].begin, (*ranges)[i].size};
  }
  *count = ranges->size();
  return {};
}

void HandReport(const unmoor::ImageReport& report, unmoor_report* to) {
  unmoor_report filled = UNMOOR_REPORT_INIT;
  CopyText(report.id, filled.id, sizeof filled.id);
  filled.delta = report.delta ? 1 : 0;
  filled.address_bytes = report.address_bytes;
  filled.written_bytes = report.written_bytes;
  filled.shared_bytes = report.shared_bytes;
  GiveBack(filled, to);
}

Status ToOptions(const unmoor_remap_options* given, unmoor::RemapOptions& options) {
  unmoor_remap_options taken = UNMOOR_REMAP_OPTIONS_INIT;
  UNMOOR_C_TRY(Take(given, taken));
  UNMOOR_C_TRY(CheckFlags(
      taken.flags, UNMOOR_REMAP_NO_HUGE_PAGES | UNMOOR_REMAP_NO_VERIFY | UNMOOR_REMAP_EVENTFD));
  if (taken.guard < UNMOOR_GUARD_FREEZE || taken.guard > UNMOOR_GUARD_FAULT ||
      taken.order < UNMOOR_ORDER_GIVEN || taken.order > UNMOOR_ORDER_HOT_FIRST) {
    return MakeStatus(StatusCode::kInvalidArgument, "unknown guard {} or order {}", taken.guard,
                      taken.order);
  }
  if (taken.threads != 0) options.threads = taken.threads;
  options.bytes_per_second = taken.bytes_per_second;
  if (taken.cpu_share != 0.0) options.cpu_share = taken.cpu_share;
  options.guard = static_cast<unmoor::Guard>(taken.guard);
  options.order = static_cast<unmoor::RemapOrder>(taken.order);
  if (taken.max_pause_ns != 0) options.max_pause = std::chrono::nanoseconds(taken.max_pause_ns);
  options.huge_pages = (taken.flags & UNMOOR_REMAP_NO_HUGE_PAGES) == 0;
  options.verify = (taken.flags & UNMOOR_REMAP_NO_VERIFY) == 0;
  options.freeze_signal = taken.freeze_signal;
  if ((taken.flags & UNMOOR_REMAP_EVENTFD) != 0) {
    options.completion_eventfd = taken.completion_eventfd;
  }
  if (taken.on_complete != nullptr) {
    options.on_complete = [call = taken.on_complete,
                           context = taken.context](unmoor::RemapStatus status) {
      call(context, static_cast<int>(status));
    };
  }
  if (taken.tracker != nullptr) options.tracker = &taken.tracker->value;
  return {};
}

uint64_t Nanoseconds(std::chrono::nanoseconds time) {
  return static_cast<uint64_t>(std::max<int64_t>(0, time.count()));
}

}  // namespace

const char* unmoor_version(void) {
  return UNMOOR_VERSION;
}

// --- Writing an image ----------------------------------------------------------------------------

int unmoor_writer_create(const char* dir, uint32_t flags, unmoor_writer** writer,
                         unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (dir == nullptr || writer == nullptr) return Missing("dir or writer");
    UNMOOR_C_TRY(CheckFlags(flags, UNMOOR_WRITE_REPLACE | UNMOOR_WRITE_NO_SYNC));
    const unmoor::WriterOptions options{.sync = (flags & UNMOOR_WRITE_NO_SYNC) == 0,
                                        .replace = (flags & UNMOOR_WRITE_REPLACE) != 0};
    return Hand(unmoor::PageImageWriter::Create(dir, options), writer);
  });
}

int unmoor_writer_add(unmoor_writer* writer, unmoor_memory memory, unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (writer == nullptr) return Missing("writer");
    return writer->value.Add({memory.begin, memory.length});
  });
}

int unmoor_writer_add_source(unmoor_writer* writer, uint64_t address, uint64_t length,
                             int protection, unmoor_page_source source, void* context,
                             unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (writer == nullptr || source == nullptr) return Missing("writer or source");
    return writer->value.Add(
        address, length, protection, [source, context](uint64_t at, void* pages, size_t size) {
          const int result = source(context, at, pages, size);
          if (result == 0) return Status();
          return MakeStatus(StatusCode::kCancelled, "the page source returned {} for {:#x}", result,
                            at);
        });
  });
}

int unmoor_writer_set_user_data(unmoor_writer* writer, const void* data, size_t length,
                                unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (writer == nullptr || (data == nullptr && length != 0)) return Missing("writer or data");
    return writer->value.SetUserData({static_cast<const char*>(data), length});
  });
}

int unmoor_writer_publish(unmoor_writer* writer, unmoor_report* report, unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (writer == nullptr) return Missing("writer");
    const auto published = writer->value.Publish();
    if (!published.ok()) return published.status();
    HandReport(*published, report);
    return {};
  });
}

void unmoor_writer_destroy(unmoor_writer* writer) {
  delete writer;
}

// --- An image ------------------------------------------------------------------------------------

int unmoor_image_open(const char* dir, uint32_t flags, unmoor_image** image, unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (dir == nullptr || image == nullptr) return Missing("dir or image");
    UNMOOR_C_TRY(CheckFlags(flags, UNMOOR_OPEN_ANY_CPU));
    return Hand(unmoor::PageImage::Open(dir, {.check_cpu = (flags & UNMOOR_OPEN_ANY_CPU) == 0}),
                image);
  });
}

const char* unmoor_image_directory(const unmoor_image* image) {
  return image->value.directory().c_str();
}

const char* unmoor_image_id(const unmoor_image* image) {
  return image->value.id().c_str();
}

const char* unmoor_image_parent_id(const unmoor_image* image) {
  return image->value.parent_id().c_str();
}

const void* unmoor_image_user_data(const unmoor_image* image, size_t* length) {
  if (length != nullptr) *length = image->value.user_data().size();
  return image->value.user_data().data();
}

size_t unmoor_image_range_count(const unmoor_image* image) {
  return image->value.ranges().size();
}

int unmoor_image_range_at(const unmoor_image* image, size_t index, unmoor_image_range* range,
                          unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (image == nullptr || range == nullptr) return Missing("image or range");
    if (index >= image->value.ranges().size()) {
      return MakeStatus(StatusCode::kInvalidArgument, "there is no range {}", index);
    }
    const unmoor::ImageRange& found = image->value.ranges()[index];
    unmoor_image_range filled = UNMOOR_IMAGE_RANGE_INIT;
    filled.address = found.address;
    filled.length = found.size;
    filled.protection = found.protection;
    filled.data_bytes = found.data_bytes;
    GiveBack(filled, range);
    return {};
  });
}

int unmoor_image_verify(const unmoor_image* image, unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (image == nullptr) return Missing("image");
    return image->value.Verify();
  });
}

void unmoor_image_close(unmoor_image* image) {
  delete image;
}

// --- Mapping it ----------------------------------------------------------------------------------

int unmoor_map_create(const unmoor_image* image, uint32_t flags, unmoor_map** map,
                      unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (image == nullptr || map == nullptr) return Missing("image or map");
    UNMOOR_C_TRY(CheckFlags(flags, UNMOOR_MAP_ANYWHERE));
    unmoor::MapOptions options;
    if ((flags & UNMOOR_MAP_ANYWHERE) != 0) options.placement = unmoor::Placement::kAnywhere;
    return Hand(unmoor::DirectMap::Map(image->value, options), map);
  });
}

size_t unmoor_map_range_count(const unmoor_map* map) {
  return map->value.ranges().size();
}

int unmoor_map_range_at(const unmoor_map* map, size_t index, unmoor_mapped_range* range,
                        unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (map == nullptr || range == nullptr) return Missing("map or range");
    if (index >= map->value.ranges().size()) {
      return MakeStatus(StatusCode::kInvalidArgument, "there is no range {}", index);
    }
    const unmoor::MappedRange& found = map->value.ranges()[index];
    unmoor_mapped_range filled = UNMOOR_MAPPED_RANGE_INIT;
    filled.recorded_address = found.recorded_address;
    filled.memory = {found.memory.begin, found.memory.size};
    filled.protection = found.protection;
    GiveBack(filled, range);
    return {};
  });
}

void* unmoor_map_find(const unmoor_map* map, uint64_t recorded_address) {
  return map->value.Find(recorded_address);
}

void unmoor_map_destroy(unmoor_map* map) {
  delete map;
}

void unmoor_map_release(unmoor_map* map) {
  if (map != nullptr) map->value.Release();
  delete map;
}

// --- What changed --------------------------------------------------------------------------------

int unmoor_tracker_start(const unmoor_memory* ranges, size_t count, unmoor_tracker** tracker,
                         unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (tracker == nullptr || (ranges == nullptr && count != 0))
      return Missing("tracker or ranges");
    return Hand(unmoor::DirtyTracker::Start(ToRanges(ranges, count)), tracker);
  });
}

int unmoor_tracker_changed(const unmoor_tracker* tracker, unmoor_memory** changed, size_t* count,
                           unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (tracker == nullptr || changed == nullptr || count == nullptr) {
      return Missing("tracker, changed or count");
    }
    return HandRanges(tracker->value.Changed(), changed, count);
  });
}

int unmoor_tracker_reset(unmoor_tracker* tracker, unmoor_memory** changed, size_t* count,
                         unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (tracker == nullptr || (changed == nullptr) != (count == nullptr)) {
      return Missing("tracker, or one of changed and count");
    }
    return HandRanges(tracker->value.Reset(), changed, count);
  });
}

int unmoor_tracker_mechanism(const unmoor_tracker* tracker) {
  return static_cast<int>(tracker->value.mechanism());
}

void unmoor_tracker_destroy(unmoor_tracker* tracker) {
  delete tracker;
}

void unmoor_memory_free(unmoor_memory* ranges) {
  delete[] ranges;
}

// --- Moving it to anonymous memory ---------------------------------------------------------------

int unmoor_remapper_start(const unmoor_map* map, const unmoor_remap_options* options,
                          unmoor_remapper** remapper, unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (map == nullptr || remapper == nullptr) return Missing("map or remapper");
    unmoor::RemapOptions taken;
    UNMOOR_C_TRY(ToOptions(options, taken));
    return Hand(unmoor::BackgroundRemapper::Start(map->value, taken), remapper);
  });
}

int unmoor_remapper_start_ranges(const unmoor_map* map, const unmoor_remap_range* ranges,
                                 size_t count, const unmoor_remap_options* options,
                                 unmoor_remapper** remapper, unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (remapper == nullptr || (ranges == nullptr && count != 0)) {
      return Missing("remapper or ranges");
    }
    unmoor::RemapOptions taken;
    UNMOOR_C_TRY(ToOptions(options, taken));
    std::vector<unmoor::RemapRange> list;
    for (size_t i = 0; i < count; ++i) {
      list.push_back({{ranges[i].memory.begin, ranges[i].memory.length},
                      ranges[i].no_system_call_writes == 0});
    }
    if (map == nullptr) return Hand(unmoor::BackgroundRemapper::Start(list, taken), remapper);
    return Hand(unmoor::BackgroundRemapper::Start(map->value, list, taken), remapper);
  });
}

int unmoor_remapper_progress(const unmoor_remapper* remapper, unmoor_progress* progress,
                             unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (remapper == nullptr || progress == nullptr) return Missing("remapper or progress");
    const unmoor::RemapProgress now = remapper->value.progress();
    unmoor_progress filled = UNMOOR_PROGRESS_INIT;
    filled.status = static_cast<int32_t>(now.status);
    filled.running = now.running ? 1 : 0;
    filled.total_bytes = now.total_bytes;
    filled.done_bytes = now.done_bytes;
    filled.refused_bytes = now.refused_bytes;
    filled.windows = now.windows;
    filled.aborted = now.aborted;
    filled.faults_caught = now.faults_caught;
    filled.longest_pause_ns = Nanoseconds(now.longest_pause);
    filled.longest_guard_ns = Nanoseconds(now.longest_guard);
    filled.writers_waited_ns = Nanoseconds(now.writers_waited);
    CopyText(now.reason, filled.reason, sizeof filled.reason);
    GiveBack(filled, progress);
    return {};
  });
}

int unmoor_remapper_wait(unmoor_remapper* remapper, int64_t timeout_ns, unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (remapper == nullptr) return Missing("remapper");
    return remapper->value.Wait(std::chrono::nanoseconds(timeout_ns));
  });
}

void unmoor_remapper_pause(unmoor_remapper* remapper) {
  remapper->value.Pause();
}

void unmoor_remapper_resume(unmoor_remapper* remapper) {
  remapper->value.Resume();
}

void unmoor_remapper_finish_now(unmoor_remapper* remapper) {
  remapper->value.FinishNow();
}

void unmoor_remapper_cancel(unmoor_remapper* remapper) {
  remapper->value.Cancel();
}

void unmoor_remapper_destroy(unmoor_remapper* remapper) {
  delete remapper;
}

int unmoor_query_status(unmoor_process_status* status, unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (status == nullptr) return Missing("status");
    const auto now = unmoor::QueryStatus();
    if (!now.ok()) return now.status();
    unmoor_process_status filled = UNMOOR_PROCESS_STATUS_INIT;
    filled.status = static_cast<int32_t>(now->status);
    filled.direct_mapped_bytes = now->direct_mapped_bytes;
    CopyText(now->reason, filled.reason, sizeof filled.reason);
    GiveBack(filled, status);
    return {};
  });
}

// --- The next image ------------------------------------------------------------------------------

int unmoor_checkpoint(const unmoor_memory* ranges, size_t count, const char* dir,
                      const unmoor_checkpoint_options* options, unmoor_report* report,
                      unmoor_error* error) {
  return Answer(error, [&]() -> Status {
    if (dir == nullptr || (ranges == nullptr && count != 0)) return Missing("dir or ranges");
    unmoor_checkpoint_options taken = UNMOOR_CHECKPOINT_OPTIONS_INIT;
    UNMOOR_C_TRY(Take(options, taken));
    UNMOOR_C_TRY(CheckFlags(taken.flags, UNMOOR_WRITE_REPLACE | UNMOOR_WRITE_NO_SYNC));
    unmoor::CheckpointOptions wanted;
    if (taken.base != nullptr) wanted.base = &taken.base->value;
    if (taken.tracker != nullptr) wanted.tracker = &taken.tracker->value;
    wanted.user_data = {static_cast<const char*>(taken.user_data), taken.user_data_length};
    wanted.sync = (taken.flags & UNMOOR_WRITE_NO_SYNC) == 0;
    wanted.replace = (taken.flags & UNMOOR_WRITE_REPLACE) != 0;
    const auto made = unmoor::Checkpoint(ToRanges(ranges, count), dir, wanted);
    if (!made.ok()) return made.status();
    HandReport(*made, report);
    return {};
  });
}
