// The plan of a restore: only what manifest and index agree on is mapped.
#include "restore/plan.h"

#include <gmock/gmock.h>

namespace unmoor {
namespace {

using ::testing::HasSubstr;

constexpr VaddrRange kRange{Vaddr(0x10000000), Vaddr(0x10400000)};

struct Checkpoint {
  Manifest manifest;
  std::vector<LayerInfo> layers;
};

Checkpoint OneMappedVma() {
  Checkpoint checkpoint;
  ManifestVma mapped;
  mapped.range = kRange;
  mapped.kind = VmaKind::kMapped;
  mapped.offset = FileOffset(0x200000);
  mapped.data = Bytes(0x10000);
  ManifestVma other;
  other.range = {Vaddr(0x20000000), Vaddr(0x20001000)};
  other.kind = VmaKind::kCriu;
  ManifestTask task;
  task.vpid = 7;
  task.state = "running";
  task.vmas = {mapped, other};
  checkpoint.manifest.tasks = {task};
  checkpoint.manifest.layers.resize(1);
  LayerInfo layer;
  layer.id = std::string(32, 'a');
  layer.file_size = Bytes(0x1000000);
  layer.extents = {{7, kRange, FileOffset(0x200000), Bytes(0x10000)}};
  layer.segments = {{7, {kRange.begin, kRange.begin + Bytes(0x10000)}, FileOffset(0x200000)}};
  checkpoint.layers = {layer};
  return checkpoint;
}

TEST(RestorePlan, MapsEachMappedVmaAtItsOffset) {
  const Checkpoint checkpoint = OneMappedVma();
  const auto plan = PlanRestore(checkpoint.manifest, checkpoint.layers, "/image");
  ASSERT_TRUE(plan) << plan.error().message();
  ASSERT_EQ(plan->tasks.size(), 1u);
  ASSERT_EQ(plan->tasks[0].mappings.size(), 1u);
  EXPECT_EQ(plan->tasks[0].vpid, 7u);
  EXPECT_EQ(plan->tasks[0].mappings[0].range, kRange);
  EXPECT_EQ(plan->tasks[0].mappings[0].offset, FileOffset(0x200000));
  EXPECT_EQ(plan->mappings, 1u);
  EXPECT_EQ(plan->mapped, kRange.size());
  EXPECT_EQ(plan->data, Bytes(0x10000));
  EXPECT_TRUE(plan->stopped.empty());
}

TEST(RestorePlan, AnImageOfMemoryIsNotRestored) {
  Checkpoint checkpoint = OneMappedVma();
  checkpoint.manifest.kind = ImageKind::kMemory;
  const auto plan = PlanRestore(checkpoint.manifest, checkpoint.layers, "/image");
  ASSERT_FALSE(plan);
  EXPECT_EQ(plan.error().kind(), ErrorKind::kUser);
  EXPECT_THAT(plan.error().message(), HasSubstr("/image is an image of memory"));
}

TEST(RestorePlan, PagesOfDeltasAreLoadedOverTheMapping) {
  Checkpoint checkpoint = OneMappedVma();
  LayerInfo delta = checkpoint.layers[0];
  delta.id = std::string(32, 'b');
  const VaddrRange page{kRange.begin + Bytes(0x8000), kRange.begin + Bytes(0x9000)};
  delta.segments = {{7, page, FileOffset(0x208000)}};
  checkpoint.layers.push_back(delta);
  checkpoint.manifest.layers.resize(2);
  checkpoint.manifest.tasks[0].vmas[0].deltas = {{1, FileOffset(0x200000)}};
  const auto plan = PlanRestore(checkpoint.manifest, checkpoint.layers, "/image");
  ASSERT_TRUE(plan) << plan.error().message();
  ASSERT_EQ(plan->tasks[0].mappings.size(), 1u);
  EXPECT_EQ(plan->tasks[0].mappings[0].layer, 0u);
  ASSERT_EQ(plan->tasks[0].loads.size(), 1u);
  EXPECT_EQ(plan->tasks[0].loads[0].range, page);
  EXPECT_EQ(plan->tasks[0].loads[0].layer, 1u);
  EXPECT_EQ(plan->tasks[0].loads[0].offset, FileOffset(0x208000));
  EXPECT_EQ(plan->loaded, page.size());
  EXPECT_EQ(plan->data, Bytes(0x10000));
}

TEST(RestorePlan, AVmaThatWouldGrowIntoOldBytesIsRefused) {
  Checkpoint checkpoint = OneMappedVma();
  checkpoint.manifest.tasks[0].vmas[0].range.end = kRange.begin + Bytes(0x8000);
  const auto plan = PlanRestore(checkpoint.manifest, checkpoint.layers, "/image");
  ASSERT_FALSE(plan);
  EXPECT_THAT(plan.error().message(), HasSubstr("would grow into other pages"));
}

TEST(RestorePlan, RemembersWhoWasStopped) {
  Checkpoint checkpoint = OneMappedVma();
  checkpoint.manifest.tasks[0].state = "stopped";
  const auto plan = PlanRestore(checkpoint.manifest, checkpoint.layers, "/image");
  ASSERT_TRUE(plan);
  EXPECT_THAT(plan->stopped, ::testing::ElementsAre(7u));
}

TEST(RestorePlan, TasksWithoutMappedMemoryNeedNoRewrite) {
  Checkpoint checkpoint = OneMappedVma();
  checkpoint.manifest.tasks[0].vmas[0].kind = VmaKind::kCriu;
  const auto plan = PlanRestore(checkpoint.manifest, checkpoint.layers, "/image");
  ASSERT_TRUE(plan);
  EXPECT_TRUE(plan->tasks.empty());
}

TEST(RestorePlan, ManifestAndIndexMustAgree) {
  const auto message = [](const Checkpoint& checkpoint) {
    const auto plan = PlanRestore(checkpoint.manifest, checkpoint.layers, "/image");
    EXPECT_FALSE(plan);
    return plan ? std::string() : plan.error().message();
  };
  Checkpoint moved = OneMappedVma();
  moved.layers[0].extents[0].offset = FileOffset(0x400000);
  EXPECT_THAT(message(moved), HasSubstr("differ"));
  Checkpoint elsewhere = OneMappedVma();
  elsewhere.layers[0].extents[0].range.begin = Vaddr(0x10200000);
  EXPECT_THAT(message(elsewhere), HasSubstr("differ"));
  Checkpoint other_task = OneMappedVma();
  other_task.layers[0].extents[0].task_vpid = 8;
  // A child's VMA may lie over its parent's extent.
  EXPECT_TRUE(PlanRestore(other_task.manifest, other_task.layers, "/image"));
  Checkpoint no_such_layer = OneMappedVma();
  no_such_layer.manifest.tasks[0].vmas[0].layer = 3;
  EXPECT_THAT(message(no_such_layer), HasSubstr("names layer 3"));
  Checkpoint missing = OneMappedVma();
  missing.layers.clear();
  EXPECT_THAT(message(missing), HasSubstr("0 layers opened"));
}

}  // namespace
}  // namespace unmoor
