// PendingFile: a new form of one file of a layer, written beside it and renamed over it.
//
//   PendingFile mended(path, kRepairInfix);
//   UNMOOR_TRY(mended.Create());
//   … write to mended.fd() …
//   UNMOOR_TRY(mended.Sync());
//   UNMOOR_TRY(mended.MoveIntoPlace());  // whoever maps or links the old file keeps that
//
// Unless it was moved into place it is removed; what a killed command left has a name that tells,
// and is removed by the next such command (RemovePending) or gc. The caller holds the image
// directory's lock, and fsyncs the directory. Document: docs/format.md, "Other names".
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"
#include "os/fd.h"

namespace unmoor {

// Behind the name of the file come this and six characters.
inline constexpr std::string_view kRepairInfix = ".repair-";
inline constexpr std::string_view kReorderInfix = ".reorder-";

class PendingFile {
 public:
  PendingFile(std::string place, std::string_view infix)
      : place_(std::move(place)), infix_(infix) {}
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;
  ~PendingFile();

  // For a file that somebody else creates.
  [[nodiscard]] Result<> Name();
  [[nodiscard]] Result<> Create();
  [[nodiscard]] Result<> Sync() const;
  [[nodiscard]] Result<> MoveIntoPlace();

  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string place_;
  std::string_view infix_;
  std::string path_;
  Fd fd_;
};

// Whether `name` is that of such a file.
[[nodiscard]] bool IsPendingName(std::string_view name, std::string_view infix);
// What killed commands left in DIR/layers.
void RemovePending(const std::string& layers, std::string_view infix);

}  // namespace unmoor
