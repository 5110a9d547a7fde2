// Names of anonymous memory, as the manifest beside a page image tells them. That the kernel takes
// them is for tests/system/zoo.py, where it has such names.
#include "agent/vma_names.h"

#include <gtest/gtest.h>

#include "../image/image_fixture.h"

namespace unmoor {
namespace {

VmaInfo Mapping(const std::string& name) {
  VmaInfo vma;
  vma.name = name;
  vma.inode = 7;
  return vma;
}

TEST(VmaNames, AreFoundByThePlaceInTheLayerWhateverTheAddressIsByNow) {
  const TemporaryDirectory dir;
  ASSERT_OK(MakeDirectory(LayersDirectory(dir.path())));
  const auto layer = MakeTestLayer(LayersDirectory(dir.path()));
  ASSERT_OK(layer);
  ASSERT_OK(WriteManifest(dir.path(), MakeTestManifest(*layer)));
  const std::string pages = LayerPagesPath(dir.path(), layer->id);
  VmaNames names;
  names.Learn(std::vector{Mapping(pages)});
  for (const Extent& extent : layer->extents) {
    const FileOffset end = extent.offset + extent.range.size();
    EXPECT_EQ(names.At(pages, extent.offset), "x");
    EXPECT_EQ(names.At(pages, extent.offset + extent.range.size() - Bytes(kPageSize)), "x");
    EXPECT_EQ(names.At(pages, end), "");  // the gap it may grow into
  }
  EXPECT_EQ(names.At("/other/layers/" + layer->id + ".pages", layer->extents[0].offset), "");
}

TEST(VmaNames, OnlyMappedMemoryOfThatLayerHasSome) {
  const TemporaryDirectory dir;
  const auto layer = MakeTestLayer(dir.path());
  ASSERT_OK(layer);
  Manifest manifest = MakeTestManifest(*layer);
  EXPECT_EQ(VmaNames::In(manifest, layer->id).size(), layer->extents.size());
  EXPECT_TRUE(VmaNames::In(manifest, std::string(32, 'f')).empty());
  for (ManifestTask& task : manifest.tasks) {
    for (ManifestVma& vma : task.vmas) {
      if (vma.name.starts_with("[anon:")) vma.name = "[heap]";
    }
  }
  EXPECT_TRUE(VmaNames::In(manifest, layer->id).empty());
}

TEST(VmaNames, WhatCannotBeReadNamesNothing) {
  VmaNames names;
  const std::string absent = "/nowhere/layers/" + std::string(32, '0') + ".pages (deleted)";
  for (const std::string& image : {absent, std::string("/nowhere/layers/x"),
                                   std::string("/pages-1.img"), std::string("/layers/")}) {
    names.Learn(std::vector{Mapping(image)});
    EXPECT_EQ(names.At(image, FileOffset(0)), "");
  }
}

}  // namespace
}  // namespace unmoor
