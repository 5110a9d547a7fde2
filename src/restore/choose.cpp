// See choose.h.
#include "restore/choose.h"

#include <fmt/format.h>

#include <algorithm>

namespace unmoor {
namespace {

// Filled in less time than a restore varies by from run to run.
constexpr Bytes kLittle(uint64_t{16} << 20);

}  // namespace

const char* ToString(RestoreMode mode) {
  switch (mode) {
    case RestoreMode::kDirect:
      return "direct";
    case RestoreMode::kEager:
      return "eager";
    case RestoreMode::kLazy:
      return "lazy";
    case RestoreMode::kAuto:
      return "auto";
  }
  return "";
}

ModeChoice ChooseMode(const ModeFacts& facts) {
  const std::string size = HumanBytes(facts.data);
  if (!facts.can_watch) {
    return {RestoreMode::kEager,
            "a program cannot be watched here (unmoor check tells what is missing)"};
  }
  if (facts.lacks_room) {
    return {RestoreMode::kDirect,
            fmt::format("mapped pages can be dropped, and {}", *facts.lacks_room)};
  }
  if (facts.data <= kLittle) return {RestoreMode::kEager, fmt::format("{} are little", size)};
  if (facts.storage == Storage::kNetwork) {
    return {RestoreMode::kEager,
            "it lies on a network file system, which a running program should not depend on"};
  }
  if (facts.packed) {
    return {RestoreMode::kLazy,
            fmt::format("it is packed, and its {} would have to be unpacked to be mapped", size)};
  }
  if (facts.storage == Storage::kMemory) {
    return {RestoreMode::kDirect, fmt::format("its {} lie in memory", size)};
  }
  if (!facts.cached) {
    return {RestoreMode::kDirect, "this kernel does not tell what is in the page cache"};
  }
  const uint64_t percent =
      std::min<uint64_t>(100, facts.cached->value / std::max<uint64_t>(1, facts.data.value / 100));
  const std::string share = fmt::format("{} % of its {} are in the page cache", percent, size);
  return {percent >= 50 ? RestoreMode::kDirect : RestoreMode::kLazy, share};
}

}  // namespace unmoor
