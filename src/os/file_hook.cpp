// See file_hook.h.
#include "os/file_hook.h"

#ifdef UNMOOR_FAULT_POINTS
#include <atomic>

namespace unmoor {
namespace {

FileHook hook;
std::atomic<bool> hooked = false;

}  // namespace

void SetFileHook(FileHook fresh) {
  hooked = false;
  hook = std::move(fresh);
  hooked = static_cast<bool>(hook);
}

int BeforeFileCall(const char* name, int fd, const std::string& path) {
  return hooked ? hook({name, fd, path}) : 0;
}

}  // namespace unmoor
#endif
