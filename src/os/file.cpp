// See file.h.
#include "os/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "os/file_hook.h"

namespace unmoor {
namespace {

Failure FileError(int errnum, const char* verb, const std::string& path) {
  return SystemError(errnum, fmt::format("cannot {} {}", verb, path));
}

// The hook's errno in errno; false: it lets the call through.
bool FailsByHook(const char* name, int fd, const std::string& path) {
  const int failure = BeforeFileCall(name, fd, path);
  if (failure != 0) errno = failure;
  return failure != 0;
}

Result<> RemoveAt(int directory, const char* name, const std::string& path, int depth) {
  if (FailsByHook("unlink", directory, path)) return FileError(errno, "remove", path);
  if (::unlinkat(directory, name, 0) == 0 || errno == ENOENT) return {};
  if (errno != EISDIR && errno != EPERM) return FileError(errno, "remove", path);
  if (depth > 32) return MachineError("cannot remove {}: nested too deeply", path);
  Fd inner(::openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!inner.valid()) return FileError(errno, "open", path);
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(::fdopendir(::dup(inner.get())), ::closedir);
  if (!stream) return FileError(errno, "list", path);
  while (const dirent* entry = ::readdir(stream.get())) {
    const std::string child = entry->d_name;
    if (child == "." || child == "..") continue;
    UNMOOR_TRY(RemoveAt(inner.get(), child.c_str(), path + "/" + child, depth + 1));
  }
  if (::unlinkat(directory, name, AT_REMOVEDIR) != 0 && errno != ENOENT) {
    return FileError(errno, "remove", path);
  }
  return {};
}

}  // namespace

Result<Fd> OpenFile(const std::string& path, int flags, mode_t mode) {
  return OpenFileAt(AT_FDCWD, path, flags, mode);
}

Result<Fd> OpenFileAt(int directory, const std::string& name, int flags, mode_t mode) {
  Fd fd;
  if (!FailsByHook("open", directory, name)) {
    fd.Reset(::openat(directory, name.c_str(), flags | O_CLOEXEC, mode));
  }
  if (!fd.valid()) return FileError(errno, (flags & O_CREAT) != 0 ? "create" : "open", name);
  return fd;
}

Result<> ReadExactlyAt(int fd, std::span<std::byte> data, FileOffset offset,
                       const std::string& name) {
  while (!data.empty()) {
    if (FailsByHook("pread", fd, name)) return FileError(errno, "read", name);
    const ssize_t n = ::pread(fd, data.data(), data.size(), static_cast<off_t>(offset.value));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(errno, "read", name);
    if (n == 0) {
      return MachineError("{} ends at offset {}, {} bytes more were expected", name, offset.value,
                          data.size());
    }
    data = data.subspan(static_cast<size_t>(n));
    offset = offset + Bytes(static_cast<uint64_t>(n));
  }
  return {};
}

Result<> WriteExactlyAt(int fd, std::span<const std::byte> data, FileOffset offset,
                        const std::string& name) {
  while (!data.empty()) {
    if (FailsByHook("pwrite", fd, name)) return FileError(errno, "write", name);
    const ssize_t n = ::pwrite(fd, data.data(), data.size(), static_cast<off_t>(offset.value));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(errno, "write", name);
    data = data.subspan(static_cast<size_t>(n));
    offset = offset + Bytes(static_cast<uint64_t>(n));
  }
  return {};
}

Result<size_t> ReadStream(int fd, std::span<std::byte> data, const std::string& name) {
  size_t done = 0;
  while (done < data.size()) {
    if (FailsByHook("read", fd, name)) return FileError(errno, "read from", name);
    const ssize_t n = ::read(fd, data.data() + done, data.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(errno, "read from", name);
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  return done;
}

Result<> WriteStream(int fd, std::span<const std::byte> data, const std::string& name) {
  while (!data.empty()) {
    if (FailsByHook("write", fd, name)) return FileError(errno, "write to", name);
    const ssize_t n = ::write(fd, data.data(), data.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(errno, "write to", name);
    data = data.subspan(static_cast<size_t>(n));
  }
  return {};
}

Result<Fd> OpenRegularFile(const std::string& path) {
  auto fd = OpenFile(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
  if (!fd && fd.error().errnum() == ELOOP) {
    return UserError("{} is a symbolic link; an image directory has none", path);
  }
  if (!fd) return fd;
  UNMOOR_ASSIGN(const struct stat info, StatFd(fd->get(), path));
  if (!S_ISREG(info.st_mode)) return UserError("{} is not a regular file", path);
  return fd;
}

namespace {

Result<std::string> ReadAll(const Fd& fd, const std::string& path, Bytes limit) {
  std::string text;
  for (;;) {
    const size_t had = text.size();
    const size_t chunk = std::max<size_t>(had, 16384);
    text.resize(had + chunk);
    UNMOOR_ASSIGN(const size_t n,
                  ReadStream(fd.get(), std::as_writable_bytes(std::span(text)).subspan(had), path));
    text.resize(had + n);
    if (text.size() > limit.value) {
      return UserError("{} is larger than the {} this file may have", path, HumanBytes(limit));
    }
    if (n < chunk) return text;
  }
}

}  // namespace

Result<std::string> ReadFile(const std::string& path, Bytes limit) {
  UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_RDONLY));
  return ReadAll(fd, path, limit);
}

Result<std::string> ReadRegularFile(const std::string& path, Bytes limit) {
  UNMOOR_ASSIGN(const Fd fd, OpenRegularFile(path));
  return ReadAll(fd, path, limit);
}

Result<> WriteFile(const std::string& path, std::string_view data, mode_t mode) {
  UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_WRONLY | O_CREAT | O_TRUNC, mode));
  return WriteStream(fd.get(), std::as_bytes(std::span(data)), path);
}

namespace {

Result<> CopyOpenFile(int in, const std::string& from, const std::string& to) {
  UNMOOR_ASSIGN(const struct stat info, StatFd(in, from));
  UNMOOR_ASSIGN(const Fd out, OpenFile(to, O_WRONLY | O_CREAT | O_EXCL, info.st_mode & 0777));
  const auto size = static_cast<uint64_t>(info.st_size);
  UNMOOR_TRY(Truncate(out.get(), Bytes(size), to));
  UNMOOR_ASSIGN(const std::vector<FileRange> ranges,
                DataRanges(in, {FileOffset(0), FileOffset(size)}, from));
  std::vector<std::byte> buffer(size_t{1} << 20);
  for (const FileRange& range : ranges) {
    for (FileOffset at = range.begin; at < range.end;) {
      const auto part =
          std::span(buffer).first(std::min<size_t>(buffer.size(), (range.end - at).value));
      UNMOOR_TRY(ReadExactlyAt(in, part, at, from));
      UNMOOR_TRY(WriteExactlyAt(out.get(), part, at, to));
      at = at + Bytes(part.size());
    }
  }
  return {};
}

}  // namespace

Result<> CopyFile(const std::string& from, const std::string& to) {
  UNMOOR_ASSIGN(const Fd in, OpenFile(from, O_RDONLY));
  return CopyOpenFile(in.get(), from, to);
}

Result<> CopyRegularFile(const std::string& from, const std::string& to) {
  UNMOOR_ASSIGN(const Fd in, OpenRegularFile(from));
  return CopyOpenFile(in.get(), from, to);
}

Result<> LinkOrCopyFile(int fd, const std::string& to) {
  const std::string from = fmt::format("/proc/self/fd/{}", fd);
  const bool linked = !FailsByHook("link", fd, to) && ::linkat(AT_FDCWD, from.c_str(), AT_FDCWD,
                                                               to.c_str(), AT_SYMLINK_FOLLOW) == 0;
  if (linked) return {};
  // EXDEV, EPERM (protected_hardlinks), EMLINK, ENOENT (it has no name any more): all the same.
  if (errno == EEXIST) return FileError(errno, "create", to);
  return CopyOpenFile(fd, from, to);
}

Result<struct stat> Stat(const std::string& path) {
  struct stat info{};
  if (FailsByHook("stat", -1, path) || ::stat(path.c_str(), &info) != 0)
    return FileError(errno, "look at", path);
  return info;
}

Result<struct stat> StatFd(int fd, const std::string& name) {
  struct stat info{};
  if (FailsByHook("fstat", fd, name) || ::fstat(fd, &info) != 0)
    return FileError(errno, "look at", name);
  return info;
}

bool Exists(const std::string& path) {
  if (!FailsByHook("faccessat", -1, path) &&
      ::faccessat(AT_FDCWD, path.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0) {
    return true;
  }
  return errno != ENOENT && errno != ENOTDIR;
}

Result<bool> IsTmpfs(const std::string& path) {
  struct statfs info{};
  if (::statfs(path.c_str(), &info) != 0) return FileError(errno, "look at", path);
  return info.f_type == TMPFS_MAGIC;
}

Result<std::vector<std::string>> ListDirectory(const std::string& path) {
  if (FailsByHook("opendir", -1, path)) return FileError(errno, "list", path);
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(::opendir(path.c_str()), ::closedir);
  if (!stream) return FileError(errno, "list", path);
  std::vector<std::string> names;
  while (const dirent* entry = ::readdir(stream.get())) {
    std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(std::move(name));
  }
  std::ranges::sort(names);
  return names;
}

Result<> MakeDirectory(const std::string& path, mode_t mode) {
  if (FailsByHook("mkdir", -1, path) || ::mkdir(path.c_str(), mode) != 0)
    return FileError(errno, "create directory", path);
  return {};
}

Result<> HardLink(const std::string& from, const std::string& to) {
  if (FailsByHook("link", -1, to) || ::link(from.c_str(), to.c_str()) != 0) {
    return SystemError(errno, fmt::format("cannot link {} as {}", from, to));
  }
  return {};
}

Result<> SymbolicLink(const std::string& target, const std::string& path) {
  if (FailsByHook("symlink", -1, path) || ::symlink(target.c_str(), path.c_str()) != 0)
    return FileError(errno, "create link", path);
  return {};
}

Result<std::string> ReadLink(const std::string& path) {
  std::string target(4096, 0);
  if (FailsByHook("readlink", -1, path)) return FileError(errno, "read link", path);
  const ssize_t n = ::readlink(path.c_str(), target.data(), target.size());
  if (n < 0) return FileError(errno, "read link", path);
  target.resize(static_cast<size_t>(n));
  return target;
}

Result<> Rename(const std::string& from, const std::string& to) {
  if (FailsByHook("rename", -1, to) || ::rename(from.c_str(), to.c_str()) != 0) {
    return SystemError(errno, fmt::format("cannot rename {} to {}", from, to));
  }
  return {};
}

Result<> RenameExchange(const std::string& a, const std::string& b) {
  if (FailsByHook("exchange", -1, b) ||
      ::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) != 0) {
    return SystemError(errno, fmt::format("cannot exchange {} and {}", a, b));
  }
  return {};
}

Result<> RemoveFile(const std::string& path) {
  if (FailsByHook("unlink", -1, path) || ::unlink(path.c_str()) != 0)
    return FileError(errno, "remove", path);
  return {};
}

Result<> RemoveTree(const std::string& path) {
  return RemoveAt(AT_FDCWD, path.c_str(), path, 0);
}

Result<> Truncate(int fd, Bytes size, const std::string& name) {
  if (FailsByHook("ftruncate", fd, name) || ::ftruncate(fd, static_cast<off_t>(size.value)) != 0)
    return FileError(errno, "resize", name);
  return {};
}

Result<bool> Allocate(int fd, FileRange range, const std::string& name) {
  if (FailsByHook("fallocate", fd, name)) return FileError(errno, "make room in", name);
  for (;;) {
    if (::fallocate(fd, 0, static_cast<off_t>(range.begin.value),
                    static_cast<off_t>(range.size().value)) == 0) {
      return true;
    }
    if (errno == EOPNOTSUPP || errno == ENOSYS) return false;
    if (errno != EINTR) return FileError(errno, "make room in", name);
  }
}

Result<> SyncFd(int fd, const std::string& name) {
  if (FailsByHook("fsync", fd, name) || ::fsync(fd) != 0)
    return FileError(errno, "write to disk (fsync)", name);
  return {};
}

Result<> SyncPath(const std::string& path) {
  UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_RDONLY));
  return SyncFd(fd.get(), path);
}

void StartWriteback(int fd, FileOffset offset, Bytes length) {
  (void)::sync_file_range(fd, static_cast<off64_t>(offset.value),
                          static_cast<off64_t>(length.value), SYNC_FILE_RANGE_WRITE);
}

void StartReading(int fd, FileRange range) {
  (void)::posix_fadvise(fd, static_cast<off64_t>(range.begin.value),
                        static_cast<off64_t>(range.size().value), POSIX_FADV_WILLNEED);
}

void ForgetCached(int fd) {
  (void)::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
}

Result<std::string> MakeTemporaryDirectory(const std::string& parent, const std::string& prefix) {
  std::string path = parent + "/" + prefix + "XXXXXX";
  if (FailsByHook("mkdtemp", -1, path) || ::mkdtemp(path.data()) == nullptr)
    return FileError(errno, "create directory", path);
  return path;
}

Result<std::string> RealPath(const std::string& path) {
  if (FailsByHook("realpath", -1, path)) return FileError(errno, "resolve", path);
  const std::unique_ptr<char, void (*)(void*)> real(::realpath(path.c_str(), nullptr), ::free);
  if (!real) return FileError(errno, "resolve", path);
  return std::string(real.get());
}

Result<std::vector<FileRange>> DataRanges(int fd, FileRange range, const std::string& name) {
  std::vector<FileRange> ranges;
  FileOffset at = range.begin;
  while (at < range.end) {
    if (FailsByHook("lseek", fd, name)) return FileError(errno, "find data in", name);
    const off_t data = ::lseek(fd, static_cast<off_t>(at.value), SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;
    if (data < 0) return FileError(errno, "find data in", name);
    if (static_cast<uint64_t>(data) >= range.end.value) break;
    const off_t hole = ::lseek(fd, data, SEEK_HOLE);
    if (hole < 0) return FileError(errno, "find holes in", name);
    const FileOffset end(std::min(static_cast<uint64_t>(hole), range.end.value));
    ranges.push_back({FileOffset(static_cast<uint64_t>(data)), end});
    at = end;
  }
  return ranges;
}

}  // namespace unmoor
