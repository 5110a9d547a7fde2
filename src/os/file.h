// Files and directories: thin, errno-keeping wrappers, the only road from the code to the disk.
//
// Every error names the file. Nothing here buffers. Thread-safe as the system calls are.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"

namespace unmoor {

// Always with O_CLOEXEC. `flags` as for open(2).
[[nodiscard]] Result<Fd> OpenFile(const std::string& path, int flags, mode_t mode = 0644);
[[nodiscard]] Result<Fd> OpenFileAt(int directory, const std::string& name, int flags,
                                    mode_t mode = 0644);

// Exactly `data.size()` bytes or an error; a short read is an error that says so. `name` is for
// the message.
[[nodiscard]] Result<> ReadExactlyAt(int fd, std::span<std::byte> data, FileOffset offset,
                                     const std::string& name);
[[nodiscard]] Result<> WriteExactlyAt(int fd, std::span<const std::byte> data, FileOffset offset,
                                      const std::string& name);
// From a stream (pipe, socket). The number of bytes read is less than asked only at end of stream.
[[nodiscard]] Result<size_t> ReadStream(int fd, std::span<std::byte> data, const std::string& name);
[[nodiscard]] Result<> WriteStream(int fd, std::span<const std::byte> data,
                                   const std::string& name);

// Whole file; `limit` caps what an untrusted file may make us allocate.
[[nodiscard]] Result<std::string> ReadFile(const std::string& path, Bytes limit = Bytes(64 << 20));
// For reading, of an image, which nobody has to trust: never another file by a symbolic link, never
// a FIFO or device that would make us wait. A user's error where it is one.
[[nodiscard]] Result<Fd> OpenRegularFile(const std::string& path);
[[nodiscard]] Result<std::string> ReadRegularFile(const std::string& path, Bytes limit);
// Creates or truncates; no fsync.
[[nodiscard]] Result<> WriteFile(const std::string& path, std::string_view data,
                                 mode_t mode = 0644);
[[nodiscard]] Result<> CopyFile(const std::string& from, const std::string& to);
// As CopyFile, of a file of an image.
[[nodiscard]] Result<> CopyRegularFile(const std::string& from, const std::string& to);
// The open file `fd` under another name: a hard link or, where none can be made (another file
// system, no permission, no name left), a copy with its holes.
[[nodiscard]] Result<> LinkOrCopyFile(int fd, const std::string& to);

[[nodiscard]] Result<struct stat> Stat(const std::string& path);  // follows links
[[nodiscard]] Result<struct stat> StatFd(int fd, const std::string& name);
// Where it cannot be told (EIO, EACCES) it does: whoever opens it then says why not.
[[nodiscard]] bool Exists(const std::string& path);
[[nodiscard]] Result<bool> IsTmpfs(const std::string& path);
// Names without "." and "..", sorted.
[[nodiscard]] Result<std::vector<std::string>> ListDirectory(const std::string& path);
[[nodiscard]] Result<> MakeDirectory(const std::string& path, mode_t mode = 0755);
[[nodiscard]] Result<> HardLink(const std::string& from, const std::string& to);
[[nodiscard]] Result<> SymbolicLink(const std::string& target, const std::string& path);
[[nodiscard]] Result<std::string> ReadLink(const std::string& path);
[[nodiscard]] Result<> Rename(const std::string& from, const std::string& to);
// renameat2(RENAME_EXCHANGE): both names exist before and after.
[[nodiscard]] Result<> RenameExchange(const std::string& a, const std::string& b);
[[nodiscard]] Result<> RemoveFile(const std::string& path);
// The whole tree; no error when it does not exist. Never follows a symbolic link.
[[nodiscard]] Result<> RemoveTree(const std::string& path);
[[nodiscard]] Result<> Truncate(int fd, Bytes size, const std::string& name);
// Gives the range its place on the disk now, all of it. False: this file system does that only when
// data is written back.
[[nodiscard]] Result<bool> Allocate(int fd, FileRange range, const std::string& name);
[[nodiscard]] Result<> SyncFd(int fd, const std::string& name);
[[nodiscard]] Result<> SyncPath(const std::string& path);  // a file or a directory
// Starts write-back of a range without waiting for it. A hint: failure is ignored.
void StartWriteback(int fd, FileOffset offset, Bytes length);
// Starts reading a range into the page cache without waiting for it. A hint: failure is ignored.
void StartReading(int fd, FileRange range);
// Has the page cache forget the file, but for what is mapped or not yet on disk. A hint.
void ForgetCached(int fd);
// A new directory below `parent`, named prefix + six random characters, mode 0700.
[[nodiscard]] Result<std::string> MakeTemporaryDirectory(const std::string& parent,
                                                         const std::string& prefix);
// Absolute, without symbolic links, of an existing path.
[[nodiscard]] Result<std::string> RealPath(const std::string& path);

// The data ranges of a sparse file within `range` (SEEK_DATA/SEEK_HOLE), in order.
[[nodiscard]] Result<std::vector<FileRange>> DataRanges(int fd, FileRange range,
                                                        const std::string& name);

}  // namespace unmoor
