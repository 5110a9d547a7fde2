// Publisher: the only way a checkpoint comes to be at its place; all of it or nothing.
//
//   UNMOOR_ASSIGN(Publisher publisher, Publisher::Begin(dir));
//   … write everything below publisher.path() …
//   UNMOOR_TRY(publisher.Publish());
//
// Work happens in DIR.partial-XXXXXX beside DIR. Publish() fsyncs each file and directory, renames
// into place (an exchange where DIR exists), fsyncs the parent and only then removes the older
// checkpoint, by unlinking: a process that still maps one of its layers keeps it. Until the rename
// DIR is untouched. Destroying an unpublished Publisher removes the partial directory.
//
// Two commands cannot publish to one DIR at once: the partial directory is flock'ed by its owner.
// One that nobody holds is left over from a killed command; Begin removes it. A DIR that exists is
// locked for writing from Begin on, so nobody reads it while it is exchanged. One thread.
// Fault points: publish.before_sync, publish.before_rename, publish.after_rename.
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"
#include "image/directory_lock.h"
#include "os/fd.h"

namespace unmoor {

class Publisher {
 public:
  // User errors: the parent is missing, DIR is no directory, is a mount point, holds anything but
  // an unmoor checkpoint, or another command is writing it. A DIR that is empty or missing is fine.
  [[nodiscard]] static Result<Publisher> Begin(const std::string& dir);
  Publisher(Publisher&& other) noexcept;
  Publisher& operator=(Publisher&&) = delete;
  ~Publisher();

  // Absolute path of the partial directory, mode 0700. It holds nothing at first.
  [[nodiscard]] const std::string& path() const { return partial_; }
  // Absolute path where it will be.
  [[nodiscard]] const std::string& target() const { return target_; }

  // Once. After an error before the rename DIR is as it was. Without `sync` nothing is flushed: the
  // checkpoint is complete for every process, but may not survive a crash of the machine.
  [[nodiscard]] Result<> Publish(bool sync = true);

 private:
  Publisher() = default;
  [[nodiscard]] Result<> MoveIntoPlace();

  std::string parent_;
  std::string target_;
  std::string partial_;        // empty: moved from
  Fd lock_;                    // of the partial directory
  DirectoryLock target_lock_;  // of the older checkpoint, until it is removed
};

// Removes a tree by one rename to the name of a partial directory: killed behind it, the next
// command or gc finishes the work, whatever is left of it. Fault point: rm.after_rename.
[[nodiscard]] Result<> RemoveAsLeftover(const std::string& path);

// Whether a name is one of a partial directory, of whatever image.
[[nodiscard]] bool IsPartialName(std::string_view name);

// True when every entry of `dir` is one a checkpoint of ours has, and the manifest is among them.
[[nodiscard]] Result<bool> IsCheckpointDirectory(const std::string& dir);

}  // namespace unmoor
