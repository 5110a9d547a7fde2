// What the image room's tests share: a temporary directory, pages with known contents, a small
// layer, a full manifest, and running one hidden test of this binary in a child with a fault point
// armed.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "image/layer_reader.h"
#include "image/layer_writer.h"
#include "image/layout.h"
#include "image/manifest.h"
#include "os/file.h"

namespace unmoor {

// A success, or its message in the test's output.
#define ASSERT_OK(result)                                            \
  do {                                                               \
    const auto& unmoor_checked = (result);                           \
    ASSERT_TRUE(unmoor_checked.has_value())                          \
        << (unmoor_checked ? "" : unmoor_checked.error().message()); \
  } while (false)

class TemporaryDirectory {
 public:
  explicit TemporaryDirectory(const std::string& parent = ::testing::TempDir())
      : path_(MakeTemporaryDirectory(parent, "unmoor-test-").value()) {}
  ~TemporaryDirectory() { (void)RemoveTree(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline VaddrRange Pages(uint64_t begin, uint64_t pages) {
  return {Vaddr(begin), Vaddr(begin + pages * kPageSize)};
}

// Contents that tell task and address; never zero.
inline std::vector<std::byte> PageContents(uint32_t task, Vaddr at, uint64_t pages) {
  std::vector<std::byte> bytes(pages * kPageSize);
  for (size_t i = 0; i < bytes.size(); i += 8) {
    const uint64_t word = (uint64_t{task} << 48) ^ (at.value + i) ^ 0x5bd1e995'00000001u;
    std::memcpy(&bytes[i], &word, sizeof word);
  }
  return bytes;
}

inline constexpr const char* kTestLayerId = "0123456789abcdef0123456789abcdef";

// Two tasks with the same addresses, zero pages among their data.
inline Result<LayerInfo> MakeTestLayer(const std::string& directory) {
  UNMOOR_ASSIGN(LayerWriter writer, LayerWriter::Create(directory, kTestLayerId));
  const std::vector<VaddrRange> vmas = {Pages(0x7f0000123000, 40), Pages(0x7f0000800000, 512)};
  for (const uint32_t task : {7u, 8u}) {
    UNMOOR_TRY(writer.AddTask(task, vmas));
    UNMOOR_TRY(writer.Write(task, vmas[0].begin, PageContents(task, vmas[0].begin, 20)));
    const Vaddr second = vmas[1].begin + Bytes(16 * kPageSize);
    auto pages = PageContents(task, second, 64);
    std::fill_n(pages.begin() + 10 * kPageSize, 3 * kPageSize, std::byte{0});
    UNMOOR_TRY(writer.Write(task, second, pages));
  }
  return writer.Finish(true);
}

inline Manifest MakeTestManifest(const LayerInfo& layer) {
  Manifest manifest;
  manifest.checkpoint_id = "00112233445566778899aabbccddeeff";
  manifest.parent_id = "ffeeddccbbaa99887766554433221100";
  manifest.created = Nanos(1'795'254'000'000'000'001);
  manifest.tool_version = "0.1.0";
  manifest.criu_version = "4.2.1";
  manifest.kernel_release = "6.18.44";
  manifest.cpu_features = {"avx2", "fpu", "sse4_2"};
  manifest.root_vpid = 7;
  manifest.layers = {
      {layer.id, layer.file_size, layer.data_bytes, layer.allocated, layer.index_checksum}};
  for (const uint32_t vpid : {7u, 8u}) {
    ManifestTask task{vpid, vpid - 6, "redis \"server\"\n", "running", {}};
    for (const Extent& extent : layer.extents) {
      if (extent.task_vpid != vpid) continue;
      task.vmas.push_back({extent.range,
                           3,
                           {"rd", "wr", "mr"},
                           "[anon:x]",
                           VmaKind::kMapped,
                           0,
                           extent.offset,
                           extent.data});
    }
    task.vmas.push_back({Pages(0x7ffff0000000, 33),
                         7,
                         {},
                         "[stack]",
                         VmaKind::kCriu,
                         0,
                         FileOffset(0),
                         Bytes(8192)});
    task.vmas.push_back({{Vaddr(0xffffffffff600000), Vaddr(0xffffffffff601000)},
                         4,
                         {},
                         "[vsyscall]",
                         VmaKind::kNone,
                         0,
                         FileOffset(0),
                         Bytes(0)});
    manifest.tasks.push_back(task);
  }
  return manifest;
}

inline std::string Slurp(const std::string& path) {
  return ReadFile(path).value();
}

// Runs the disabled test `name` of this binary with UNMOOR_FAULT=`fault` and UNMOOR_TEST_DIR=`dir`.
// Returns the wait status. A new process, since fault points read the environment once.
inline int RunHiddenTest(const std::string& name, const std::string& fault,
                         const std::string& dir) {
  const std::string filter = "--gtest_filter=" + name;
  const pid_t child = ::fork();
  if (child == 0) {
    ::setenv("UNMOOR_FAULT", fault.c_str(), 1);
    ::setenv("UNMOOR_TEST_DIR", dir.c_str(), 1);
    ::execl("/proc/self/exe", "test", filter.c_str(), "--gtest_also_run_disabled_tests",
            "--gtest_brief=1", nullptr);
    ::_exit(127);
  }
  int status = -1;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

}  // namespace unmoor
