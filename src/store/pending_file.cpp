// See pending_file.h.
#include "store/pending_file.h"

#include <fcntl.h>

#include <utility>

#include "base/log.h"
#include "image/layout.h"
#include "os/file.h"

namespace unmoor {

PendingFile::~PendingFile() {
  if (!path_.empty()) (void)RemoveFile(path_);
}

Result<> PendingFile::Name() {
  constexpr size_t kDigits = 6;
  UNMOOR_ASSIGN(const std::string id, NewId());
  path_ = place_ + std::string(infix_) + id.substr(0, kDigits);
  return {};
}

Result<> PendingFile::Create() {
  UNMOOR_TRY(Name());
  auto fd = OpenFile(path_, O_RDWR | O_CREAT | O_EXCL, 0600);
  if (!fd) {
    path_.clear();
    return Failure(std::move(fd).error());
  }
  fd_ = std::move(*fd);
  return {};
}

Result<> PendingFile::Sync() const {
  return SyncPath(path_);
}

Result<> PendingFile::MoveIntoPlace() {
  UNMOOR_TRY(Rename(path_, place_));
  path_.clear();
  return {};
}

bool IsPendingName(std::string_view name, std::string_view infix) {
  return name.find(infix) != std::string_view::npos;
}

void RemovePending(const std::string& layers, std::string_view infix) {
  const auto names = ListDirectory(layers);
  if (!names) return;
  for (const std::string& name : *names) {
    if (!IsPendingName(name, infix)) continue;
    spdlog::info("removing {}/{}, left by a command that did not finish", layers, name);
    (void)RemoveFile(layers + "/" + name);
  }
}

}  // namespace unmoor
