// What the installed library carries of others, so that a program needs none of it: the hash here,
// formatting and logging in tools/unmoor/static_runtime.cpp. All of it becomes local to the library.
//
// A library prints nothing: what the rooms would log is in the Status they return.
#define XXH_STATIC_LINKING_ONLY
#define XXH_IMPLEMENTATION
#include <spdlog/spdlog.h>
#include <xxhash.h>

namespace {

[[gnu::constructor]] void BeQuiet() {
  spdlog::set_level(spdlog::level::off);
}

}  // namespace
