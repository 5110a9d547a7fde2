// Manifest: DIR/manifest.json, what a checkpoint consists of and where it was made.
//
// Written once, never changed. Its last member is an XXH3-128 over all bytes before it, and the
// bytes from there to the end have one fixed form, so a change of any one byte is found. Reading
// checks types, counts and ranges and refuses members it does not know; it reads this format
// version only. Errors are the user's (ErrorKind::kUser), one line each. Plain values, no threads.
// Document: docs/format.md, "Manifest".
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

enum class ImageKind {
  kProcess,  // a CRIU checkpoint: everything a process tree consists of
  kMemory,   // memory ranges of one process, made by the library: one task, no criu/
};

enum class VmaKind {
  kMapped,  // its pages are in a layer and can be direct-mapped
  kCriu,    // its pages (if any) are in CRIU's pages images
  kNone,    // CRIU recreates it without any pages of ours or its own
};

// A layer whose segments lie over those of the layers below it.
struct ManifestDelta {
  uint32_t layer = 0;  // index into Manifest::layers
  FileOffset offset;   // of the VMA's first page in that layer
  bool operator==(const ManifestDelta&) const = default;
};

struct ManifestVma {
  VaddrRange range;
  int prot = 0;                    // PROT_READ | PROT_WRITE | PROT_EXEC
  std::vector<std::string> flags;  // two-letter names of smaps' VmFlags
  std::string name;
  VmaKind kind = VmaKind::kNone;
  uint32_t layer = 0;                      // kMapped: index into Manifest::layers
  FileOffset offset;                       // kMapped: of the VMA's first page in it
  Bytes data;                              // bytes of pages saved, wherever they are
  std::vector<ManifestDelta> deltas = {};  // kMapped: over `layer`, lowest first
  bool operator==(const ManifestVma&) const = default;
};

struct ManifestTask {
  uint32_t vpid = 0;  // in the task's own PID namespace, as CRIU names it
  uint32_t ppid = 0;
  std::string comm;
  std::string state;              // "running", "stopped", "zombie" …: CRIU's word is not needed
  std::vector<ManifestVma> vmas;  // ascending, apart
  bool operator==(const ManifestTask&) const = default;
};

struct ManifestLayer {
  std::string id;
  Bytes pages_size;  // of the sparse file
  Bytes data;
  Bytes allocated;
  uint64_t index_checksum = 0;  // LayerInfo::index_checksum
  bool operator==(const ManifestLayer&) const = default;
};

// DIR/user_data, what a program keeps with its memory.
struct ManifestUserData {
  Bytes size;
  uint64_t hash = 0;  // XXH3-64
  bool operator==(const ManifestUserData&) const = default;
};

// Summed up from the tasks and layers; stored in the file for readers of it, checked at parse.
struct ManifestTotals {
  uint64_t tasks = 0;
  uint64_t vmas = 0;
  Bytes mapped;      // address space of mapped VMAs
  Bytes layer_data;  // pages in layers
  Bytes criu_data;   // pages that stay with CRIU
  bool operator==(const ManifestTotals&) const = default;
};

struct Manifest {
  ImageKind kind = ImageKind::kProcess;
  std::string checkpoint_id;  // NewId()
  std::optional<std::string> parent_id;
  std::optional<Bytes>
      written;    // pages in the layer that the dump wrote, however often flattened since
  Nanos created;  // since 1970, UTC
  std::string tool_version;
  std::string criu_version;
  std::string kernel_release;
  uint32_t page_size = kPageSize;
  std::vector<std::string> cpu_features;  // ascending, each once
  uint32_t root_vpid = 0;
  std::vector<ManifestTask> tasks;
  std::vector<ManifestLayer> layers;
  std::optional<ManifestUserData> user_data;

  [[nodiscard]] ManifestTotals Totals() const;
  bool operator==(const Manifest&) const = default;
};

// The exact text of manifest.json, checked as ParseManifest would.
[[nodiscard]] Result<std::string> EncodeManifest(const Manifest& manifest);
// `name` is the file's name for messages.
[[nodiscard]] Result<Manifest> ParseManifest(const std::string& text, const std::string& name);

// Writes DIR/manifest.json, which must not exist (inside a Publisher's directory; it fsyncs).
[[nodiscard]] Result<> WriteManifest(const std::string& dir, const Manifest& manifest);
// Reads DIR/manifest.json. Says what DIR is when it is no image: missing, no directory, empty, a
// stock CRIU directory, something else.
[[nodiscard]] Result<Manifest> ReadManifest(const std::string& dir);

// DIR/user_data: written (it must not exist) with the manifest's entry for it; read and compared
// with that entry.
[[nodiscard]] Result<ManifestUserData> WriteUserData(const std::string& dir,
                                                     std::string_view bytes);
[[nodiscard]] Result<std::string> ReadUserData(const std::string& dir,
                                               const ManifestUserData& entry);

// This machine, for the manifest and to compare with one.
struct HostFacts {
  std::string kernel_release;
  uint32_t page_size = kPageSize;
  std::vector<std::string> cpu_features;  // flags of the first CPU in /proc/cpuinfo, sorted
};
[[nodiscard]] Result<HostFacts> ReadHostFacts();
// An error naming what the checkpoint needs and this machine lacks (CPU features, page size).
[[nodiscard]] Result<> CheckHost(const Manifest& manifest, const HostFacts& host);

}  // namespace unmoor
