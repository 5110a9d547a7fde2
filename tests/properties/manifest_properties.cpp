// The manifest: any valid one is read as it was written, and no byte of it can change unnoticed.
// Document: docs/format.md, "Manifest".
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "generators.h"
#include "image/layout.h"
#include "image/manifest.h"

namespace unmoor::properties {
namespace {

ManifestLayer MakeLayer() {
  ManifestLayer layer;
  layer.id = *Ids();
  layer.pages_size = Bytes(kHugePageSize * *rc::gen::inRange<uint64_t>(100, 1000));
  layer.data = Bytes(*rc::gen::inRange<uint64_t>(0, layer.pages_size.value + 1));
  layer.allocated = Bytes(*rc::gen::arbitrary<uint64_t>());
  layer.index_checksum = *rc::gen::arbitrary<uint64_t>();
  return layer;
}

ManifestVma MakeVma(uint64_t page, size_t layers) {
  const auto pages = *rc::gen::inRange<uint64_t>(1, 600);
  ManifestVma vma;
  vma.range = PagesAt(page, page + pages);
  vma.prot = *rc::gen::inRange(0, 8);
  vma.flags = *rc::gen::container<std::vector<std::string>>(
      *rc::gen::inRange<size_t>(0, 30),
      rc::gen::element<std::string>("rd", "wr", "mr", "hg", "dd"));
  vma.name = *Texts();
  vma.data = Bytes(kPageSize * *rc::gen::inRange<uint64_t>(0, pages + 1));
  vma.kind = *rc::gen::element(VmaKind::kMapped, VmaKind::kCriu, VmaKind::kNone);
  if (vma.kind == VmaKind::kMapped && layers == 0) vma.kind = VmaKind::kCriu;
  if (vma.kind != VmaKind::kMapped) return vma;
  vma.layer = static_cast<uint32_t>(*rc::gen::inRange<size_t>(0, layers));
  vma.offset = FileOffset(kHugePageSize * *rc::gen::inRange<uint64_t>(0, 90) +
                          vma.range.begin.value % kHugePageSize);
  return vma;
}

Manifest MakeManifest() {
  Manifest manifest;
  manifest.checkpoint_id = *Ids();
  if (*rc::gen::arbitrary<bool>()) manifest.parent_id = *Ids();
  manifest.created = Nanos(*rc::gen::inRange<int64_t>(0, INT64_MAX));
  manifest.tool_version = *Texts();
  manifest.criu_version = *Texts();
  manifest.kernel_release = *Texts();
  const auto features = *rc::gen::container<std::set<std::string>>(Texts());
  manifest.cpu_features.assign(features.begin(), features.end());
  for (int n = *rc::gen::inRange(0, 4); n > 0; --n) manifest.layers.push_back(MakeLayer());
  for (uint32_t vpid = 1, end = *rc::gen::inRange<uint32_t>(2, 5); vpid < end; ++vpid) {
    ManifestTask task;
    task.vpid = vpid * 3;
    task.ppid = *rc::gen::inRange<uint32_t>(0, 1000);
    task.comm = *Texts();
    task.state = *rc::gen::element<std::string>("running", "stopped", "zombie");
    uint64_t page = 0;
    for (int n = *rc::gen::inRange(0, 5); n > 0; --n) {
      task.vmas.push_back(
          MakeVma(page + *rc::gen::inRange<uint64_t>(0, 2000), manifest.layers.size()));
      page = task.vmas.back().range.end.value / kPageSize;
    }
    manifest.tasks.push_back(task);
  }
  manifest.root_vpid = manifest.tasks.back().vpid;
  return manifest;
}

RC_GTEST_PROP(ManifestProperties, WhatIsWrittenIsReadAndWrittenAgainTheSame, ()) {
  const Manifest manifest = MakeManifest();
  const auto text = EncodeManifest(manifest);
  if (!text) RC_FAIL(text.error().message());
  const auto read = ParseManifest(*text, "manifest");
  RC_ASSERT(read.has_value());
  RC_ASSERT(*read == manifest);
  RC_ASSERT(EncodeManifest(*read).value() == *text);
}

RC_GTEST_PROP(ManifestProperties, OneChangedByteIsFound, ()) {
  std::string text = EncodeManifest(MakeManifest()).value();
  char& byte = text[*rc::gen::inRange<size_t>(0, text.size())];
  byte = static_cast<char>(byte ^ *rc::gen::inRange(1, 256));
  RC_ASSERT(!ParseManifest(text, "manifest"));
}

RC_GTEST_PROP(ManifestProperties, AManifestCutShortOrWithSomethingBehindItIsRefused, ()) {
  const std::string text = EncodeManifest(MakeManifest()).value();
  RC_ASSERT(!ParseManifest(text.substr(0, *rc::gen::inRange<size_t>(0, text.size())), "manifest"));
  RC_ASSERT(!ParseManifest(text + *rc::gen::element(' ', '\n', '}', 'x'), "manifest"));
}

}  // namespace
}  // namespace unmoor::properties
