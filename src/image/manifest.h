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
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

enum class VmaKind {
  kMapped,  // its pages are in a layer and can be direct-mapped
  kCriu,    // its pages (if any) are in CRIU's pages images
  kNone,    // CRIU recreates it without any pages of ours or its own
};

struct ManifestVma {
  VaddrRange range;
  int prot = 0;                    // PROT_READ | PROT_WRITE | PROT_EXEC
  std::vector<std::string> flags;  // two-letter names of smaps' VmFlags
  std::string name;
  VmaKind kind = VmaKind::kNone;
  uint32_t layer = 0;  // kMapped: index into Manifest::layers
  FileOffset offset;   // kMapped: of the VMA's extent
  Bytes data;          // bytes of pages saved, wherever they are
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
  std::string checkpoint_id;  // NewId()
  std::optional<std::string> parent_id;
  Nanos created;  // since 1970, UTC
  std::string tool_version;
  std::string criu_version;
  std::string kernel_release;
  uint32_t page_size = kPageSize;
  std::vector<std::string> cpu_features;  // ascending, each once
  uint32_t root_vpid = 0;
  std::vector<ManifestTask> tasks;
  std::vector<ManifestLayer> layers;

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
