// Flatten: one layer, the same memory, nothing else touched; and what forked tasks share.
#include "store/flatten.h"

#include <fcntl.h>

#include <algorithm>

#include "image/verify.h"
#include "image_fixture.h"
#include "simulated_tree.h"
#include "store/catalog.h"
#include "store/diff.h"

namespace unmoor {
namespace {

class FlattenTest : public ::testing::Test {
 protected:
  // A parent and a child with most pages in common, two generations of changes.
  void SetUp() override {
    tree_[1].Map(0, 64);
    for (uint64_t page = 0; page < 60; ++page) tree_[1].pages[page] = page + 1;
    tree_[2] = tree_[1];
    tree_[2].parent = 1;
    tree_[2].pages[7] = 700;
    ASSERT_OK(DumpTree(tree_, At("0"), std::nullopt));
    for (int i = 1; i < 4; ++i) {
      tree_[1].pages[static_cast<uint64_t>(i)] = 1000u + static_cast<uint64_t>(i);
      tree_[2].pages.erase(static_cast<uint64_t>(20 + i));
      ASSERT_OK(DumpTree(tree_, At(std::to_string(i)), At(std::to_string(i - 1))));
    }
  }
  [[nodiscard]] std::string At(const std::string& name) const { return store_.path() + "/" + name; }
  [[nodiscard]] static Manifest Read(const std::string& directory) {
    return ReadManifest(directory).value();
  }

  const TemporaryDirectory store_;
  SimulatedTree tree_;
};

TEST_F(FlattenTest, OneLayerShowsWhatTheChainShowed) {
  const Manifest before = Read(At("3"));
  ASSERT_GE(before.layers.size(), 4u);
  ASSERT_OK(ExpectShows(At("3"), tree_));
  const auto report = Flatten({At("3"), {}, {}});
  ASSERT_OK(report);
  EXPECT_EQ(report->layers_before, before.layers.size());
  ASSERT_OK(ExpectShows(At("3"), tree_));
  const Manifest after = Read(At("3"));
  ASSERT_EQ(after.layers.size(), 1u);
  EXPECT_TRUE(VerifyLayer(At("3"), after.layers[0].id, &after.layers[0], {}).damages.empty());
  EXPECT_EQ(ListDirectory(LayersDirectory(At("3")))->size(), 2u);
  EXPECT_EQ(after.checkpoint_id, before.checkpoint_id);
  EXPECT_EQ(after.parent_id, before.parent_id);
  EXPECT_EQ(after.created, before.created);
  EXPECT_EQ(Slurp(CriuDirectory(At("3")) + "/inventory.img"), "criu's");
  // The others are what they were; and so is what is dumped after it.
  ASSERT_OK(RemoveTree(At("0")));
  tree_[1].pages[50] = 5000;
  ASSERT_OK(DumpTree(tree_, At("4"), At("3")));
  ASSERT_OK(ExpectShows(At("4"), tree_));
  EXPECT_EQ(Read(At("4")).layers.size(), 2u);
}

TEST_F(FlattenTest, IntoAnotherDirectoryLeavesTheFirst) {
  ASSERT_OK(Flatten({At("3"), At("flat"), {}}));
  ASSERT_OK(ExpectShows(At("flat"), tree_));
  ASSERT_OK(ExpectShows(At("3"), tree_));
  EXPECT_EQ(Read(At("flat")).layers.size(), 1u);
  EXPECT_GE(Read(At("3")).layers.size(), 4u);
}

TEST_F(FlattenTest, WhatIsFlatIsNotWrittenAgain) {
  ASSERT_OK(Flatten({At("3"), {}, {}}));
  const Manifest before = Read(At("3"));
  const auto again = Flatten({At("3"), {}, {}});
  ASSERT_OK(again);
  EXPECT_TRUE(again->was_flat);
  EXPECT_EQ(Read(At("3")), before);
}

TEST_F(FlattenTest, DamageIsRefusedAndNothingChanges) {
  const Manifest before = Read(At("3"));
  const std::string pages = LayerPagesPath(At("3"), before.layers[0].id);
  const auto layer = LayerReader::Open(At("3"), before.layers[0]);
  ASSERT_OK(layer);
  const Fd fd = OpenFile(pages, O_RDWR).value();
  const std::vector<std::byte> damage(16, std::byte{0x55});
  ASSERT_OK(WriteExactlyAt(fd.get(), damage, layer->segments().back().offset + Bytes(100), pages));
  const auto report = Flatten({At("3"), {}, {}});
  ASSERT_FALSE(report);
  EXPECT_NE(report.error().message().find("damaged"), std::string::npos)
      << report.error().message();
  EXPECT_EQ(Read(At("3")), before);
  EXPECT_EQ(ListDirectory(store_.path())->size(), 4u);
}

TEST_F(FlattenTest, PagesOfAForkedChildAreStoredOnceAndMappedFromOnePlace) {
  for (const std::string& image : {At("0"), At("3")}) {
    if (image == At("3")) ASSERT_OK(Flatten({image, {}, {}}));
    const Manifest manifest = Read(image);
    const ManifestVma& parents = manifest.tasks[0].vmas[0];
    const ManifestVma& childs = manifest.tasks[1].vmas[0];
    EXPECT_EQ(parents.layer, childs.layer) << image;
    EXPECT_EQ(parents.offset, childs.offset) << image;
    // 60 pages of the parent's, and the few the child has otherwise.
    EXPECT_LE(manifest.layers[0].data, Bytes(70 * kPageSize)) << image;
  }
}

TEST_F(FlattenTest, ALongOrMostlyDeadChainIsWorthIt) {
  // What the child still has from its parent is not dead, although the parent has it otherwise now.
  EXPECT_EQ(MeasureChain(At("3"))->dead(), Bytes(0));
  tree_[1].pages[40] = tree_[2].pages[40] = 4000;
  ASSERT_OK(DumpTree(tree_, At("4"), At("3")));
  const auto chain = MeasureChain(At("4"));
  ASSERT_OK(chain);
  EXPECT_EQ(chain->layers, Read(At("4")).layers.size());
  EXPECT_GT(chain->dead(), Bytes(0));
  EXPECT_TRUE(IsWorthFlattening(*chain, chain->layers - 1));
  EXPECT_FALSE(IsWorthFlattening(*chain, chain->layers));
  ChainLength dead;
  dead.layers = 2;
  dead.pages = Bytes(uint64_t{201} << 20);
  dead.shown = Bytes(uint64_t{100} << 20);
  EXPECT_TRUE(IsWorthFlattening(dead, 32));
  dead.shown = Bytes(uint64_t{101} << 20);
  EXPECT_FALSE(IsWorthFlattening(dead, 32));
}

TEST_F(FlattenTest, LogTellsWhatTheDumpsWroteAsBefore) {
  const auto before = ListGenerations({store_.path()});
  ASSERT_OK(before);
  for (const char* name : {"1", "3"}) ASSERT_OK(Flatten({At(name), {}, {}}));
  const auto after = ListGenerations({store_.path()});
  ASSERT_OK(after);
  ASSERT_EQ(after->size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ((*after)[i].written, (*before)[i].written) << (*after)[i].directory;
    EXPECT_TRUE((*after)[i].written_known());
    EXPECT_EQ((*after)[i].parent_directory, (*before)[i].parent_directory);
  }
  EXPECT_LE((*after)[3].written, Bytes(4 * kPageSize));
}

}  // namespace
}  // namespace unmoor
