// Which way to restore, for those who leave it to us (restore --mode auto), and why.
//
// Pure. Where the figures come from: docs/cli.md, "auto".
#pragma once

#include <optional>
#include <string>

#include "base/units.h"
#include "os/storage.h"

namespace unmoor {

enum class RestoreMode {
  kDirect,  // runs at once, remapped in the background
  kEager,   // all of its memory is there, anonymous, before it runs
  kLazy,    // runs at once, its pages brought when it touches them, and in the background
  kAuto,    // one of these
};
[[nodiscard]] const char* ToString(RestoreMode mode);

struct ModeFacts {
  Bytes data;                   // of all layers, as they are in memory
  std::optional<Bytes> cached;  // of it, in the page cache; nothing: cannot be told
  bool packed = false;          // some of it: what is to be mapped has to be unpacked first
  Storage storage = Storage::kDisk;
  bool can_watch = true;                  // userfaultfd, page scans: what direct and lazy need
  std::optional<std::string> lacks_room;  // why there is no memory for all of it
};

struct ModeChoice {
  RestoreMode mode = RestoreMode::kDirect;
  std::string why;  // half a sentence
};
[[nodiscard]] ModeChoice ChooseMode(const ModeFacts& facts);

}  // namespace unmoor
