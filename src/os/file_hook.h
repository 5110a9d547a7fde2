// For tests: a look at every system call on files before it is made, and the power to fail it.
//
// A test that lists all calls of an operation can fail each in turn, and one that sees each fsync
// and rename knows what a machine that loses power would still have. Compiled out unless the build
// sets UNMOOR_FAULT_POINTS. Set and taken away while nothing runs; called from any thread.
#pragma once

#include <functional>
#include <string>

namespace unmoor {

struct FileCall {
  const char* name;  // as in "fsync"
  int fd;            // -1: it is about `path`
  std::string path;
};

#ifdef UNMOOR_FAULT_POINTS
// Returns the errno with which the call is to fail, or 0: it is made.
using FileHook = std::function<int(const FileCall&)>;
void SetFileHook(FileHook hook);

[[nodiscard]] int BeforeFileCall(const char* name, int fd, const std::string& path);
#else
[[nodiscard]] inline int BeforeFileCall(const char*, int, const std::string&) {
  return 0;
}
#endif

}  // namespace unmoor
