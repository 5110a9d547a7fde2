// See report.h.
#include "report.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace report {
namespace {

char program_name[32];
char path[512];
char temporary[544];
bool is_child = false;
std::atomic<bool> failed{false};

// A checkpoint may be made while this file is open, and restored when others have been written
// since: CRIU wants to find it under its name, as long as it was. So it is never renamed away for
// good, and always of one size.
constexpr size_t kFileSize = 4096;

bool WriteTemporary(const char* text, size_t length) {
  char page[kFileSize];
  std::memset(page, ' ', sizeof page);
  std::memcpy(page, text, std::min(length, sizeof page));
  const int fd = open(temporary, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) return false;
  const bool whole = write(fd, page, sizeof page) == static_cast<ssize_t>(sizeof page);
  close(fd);
  return whole;
}

void Replace(const char* target, const char* text, size_t length) {
  if (path[0] == 0 || !WriteTemporary(text, length)) return;
  if (renameat2(AT_FDCWD, temporary, AT_FDCWD, target, RENAME_EXCHANGE) == 0) return;
  rename(temporary, target);
}

}  // namespace

void Open(const char* program, const char* report_path) {
  std::snprintf(program_name, sizeof program_name, "%s", program);
  if (report_path == nullptr) return;
  std::snprintf(path, sizeof path, "%s", report_path);
  std::snprintf(temporary, sizeof temporary, "%s.tmp", report_path);
  if (WriteTemporary("", 0)) rename(temporary, path);  // both are there before the first report
  WriteTemporary("", 0);
}

void Write(const char* fields) {
  if (failed.load()) return;
  char text[4096];
  const int length =
      std::snprintf(text, sizeof text, "{\"program\": \"%s\", \"pid\": %d, \"errors\": 0, %s}\n",
                    program_name, static_cast<int>(getpid()), fields);
  if (length > 0) Replace(path, text, static_cast<size_t>(length));
}

void Fail(const char* format, ...) {
  if (failed.exchange(true)) {
    for (;;) pause();  // another thread is telling already
  }
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  char text[2048];
  const int length = std::snprintf(text, sizeof text,
                                   "{\"program\": \"%s\", \"pid\": %d, \"errors\": 1, "
                                   "\"error\": \"%s%s\"}\n",
                                   program_name, static_cast<int>(getpid()),
                                   is_child ? "forked child: " : "", message);
  std::fprintf(stderr, "%s: %s%s\n", program_name, is_child ? "forked child: " : "", message);
  char child_path[544];
  std::snprintf(child_path, sizeof child_path, "%s.child", path);
  if (is_child) std::snprintf(temporary, sizeof temporary, "%s.child.tmp", path);
  if (length > 0) Replace(is_child ? child_path : path, text, static_cast<size_t>(length));
  _exit(is_child ? kChildFailed : 1);
}

void BecomeChild() {
  is_child = true;
}

uint64_t NowNanos() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace report
