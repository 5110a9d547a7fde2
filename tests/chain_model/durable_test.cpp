// What is said to be on the disk is: each file is fsynced after the last write to it and before
// whatever depends on it (criu's leave to end the program, an unlink, a rename). Publish() fsyncs
// everything once more, so a loss of power alone does not tell (crash_test.cpp): the calls do.
#include <algorithm>
#include <mutex>

#include "image/layer_draft.h"
#include "image/pack.h"
#include "image/verify.h"
#include "image_fixture.h"
#include "os/file_hook.h"
#include "store/repair.h"

namespace unmoor {
namespace {

#ifdef UNMOOR_FAULT_POINTS

// The calls on files while it lives, in order, as "fsync PATH" with the end of the path only.
class Watched {
 public:
  Watched() {
    SetFileHook([this](const FileCall& call) {
      const std::lock_guard lock(mutex_);
      calls_.push_back({call.name, call.path});
      return fails_ == std::string(call.name) && call.path.ends_with(suffix_) ? EIO : 0;
    });
  }
  ~Watched() { SetFileHook({}); }
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;

  void Fail(const std::string& name, const std::string& suffix) {
    fails_ = name;
    suffix_ = suffix;
  }
  // The place of the last such call, -1: there was none. `part` is part of its path.
  [[nodiscard]] long Last(std::string_view name, std::string_view part) const {
    const std::lock_guard lock(mutex_);
    for (size_t i = calls_.size(); i-- > 0;) {
      if (calls_[i].first == name && calls_[i].second.find(part) != std::string::npos) {
        return static_cast<long>(i);
      }
    }
    return -1;
  }
  [[nodiscard]] long LastWrite(std::string_view part) const {
    return std::max(Last("pwrite", part), Last("write", part));
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::pair<std::string, std::string>> calls_;
  std::string fails_;
  std::string suffix_;
};

TEST(Durable, ALayerIsOnTheDiskWhenItIsFinished) {
  for (const bool draft : {false, true}) {
    const TemporaryDirectory dir;
    const Watched watched;
    if (draft) {
      auto layer = LayerDraft::Create(dir.path(), kTestLayerId);
      ASSERT_OK(layer);
      ASSERT_OK(layer->AddVma(7, Pages(0x7f0000123000, 8)));
      ASSERT_OK(layer->Show(7, Vaddr(0x7f0000123000), PageContents(7, Vaddr(0x7f0000123000), 8)));
      ASSERT_OK(layer->Sync());
      EXPECT_GT(watched.Last("fsync", ".pages"), watched.LastWrite(".pages")) << "after a round";
      ASSERT_OK(layer->Show(7, Vaddr(0x7f0000123000), PageContents(8, Vaddr(0x7f0000123000), 8)));
      ASSERT_OK(layer->Finish());
    } else {
      ASSERT_OK(MakeTestLayer(dir.path()));
    }
    for (const char* part : {".pages", ".index"}) {
      EXPECT_GE(watched.Last("fsync", part), 0) << part << (draft ? " of a draft" : "");
      EXPECT_GT(watched.Last("fsync", part), watched.LastWrite(part)) << part;
    }
  }
}

// So criu hears of it while the program is still there.
TEST(Durable, ALayerThatCannotBeFlushedIsNotFinished) {
  for (const char* part : {".pages", ".index"}) {
    const TemporaryDirectory dir;
    Watched watched;
    watched.Fail("fsync", part);
    EXPECT_FALSE(MakeTestLayer(dir.path()).has_value()) << part;
  }
}

class DurableImage {
 public:
  DurableImage() {
    EXPECT_TRUE(MakeDirectory(path()));
    const auto layer = MakeTestLayer(LayersDirectory(path()));
    EXPECT_TRUE(layer.has_value());
    entry_ = MakeTestManifest(*layer).layers.front();
  }
  [[nodiscard]] std::string path() const { return dir_.path() + "/image"; }
  [[nodiscard]] std::string copy() const {
    const std::string to = dir_.path() + "/copy";
    EXPECT_TRUE(MakeDirectory(to));
    EXPECT_TRUE(MakeDirectory(LayersDirectory(to)));
    const std::vector<std::string> names = ListDirectory(LayersDirectory(path())).value();
    for (const std::string& name : names) {
      EXPECT_TRUE(CopyFile(LayersDirectory(path()) + "/" + name, LayersDirectory(to) + "/" + name));
    }
    return to;
  }
  [[nodiscard]] const ManifestLayer& entry() const { return entry_; }

 private:
  const TemporaryDirectory dir_;
  ManifestLayer entry_;
};

TEST(Durable, PagesGoOnlyOnceTheirPackedFormIsOnTheDisk) {
  const DurableImage image;
  {
    const Watched watched;
    ASSERT_OK(PackLayerIn(image.path(), image.entry(), Compression{}, {}));
    EXPECT_GT(watched.Last("fsync", ".packed"), watched.LastWrite(".packed"));
    EXPECT_GT(watched.Last("unlink", ".pages"), watched.Last("fsync", ".packed"));
  }
  const DurableImage other;
  Watched watched;
  watched.Fail("fsync", ".packed");
  EXPECT_FALSE(PackLayerIn(other.path(), other.entry(), Compression{}, {}).has_value());
  EXPECT_TRUE(Exists(LayerPagesPath(other.path(), other.entry().id)));
  EXPECT_FALSE(Exists(LayerPackedPath(other.path(), other.entry().id)));
}

TEST(Durable, ARepairReplacesAFileOnlyByOneThatIsOnTheDisk) {
  for (const bool index : {false, true}) {
    const DurableImage image;
    const std::string copy = image.copy();
    const std::string victim = index ? LayerIndexPath(image.path(), image.entry().id)
                                     : LayerPagesPath(image.path(), image.entry().id);
    {
      const auto data = DataRanges(OpenFile(victim, 0).value().get(),
                                   {FileOffset(0), FileOffset(uint64_t{1} << 40)}, victim);
      ASSERT_OK(data);
      const Fd fd = OpenFile(victim, 2 /*O_RDWR*/).value();
      ASSERT_OK(WriteExactlyAt(fd.get(), std::vector<std::byte>(64, std::byte{0x55}),
                               data->front().begin, victim));
    }
    const LayerVerdict verdict = VerifyLayer(image.path(), image.entry().id, &image.entry(), {});
    ASSERT_FALSE(verdict.damages.empty());
    const std::string layers = LayersDirectory(image.path());
    const Watched watched;
    ASSERT_OK(RepairLayer(image.path(), copy, image.entry(), verdict));
    const long renamed = watched.Last("rename", victim);
    ASSERT_GE(renamed, 0);
    const std::string beside = victim + ".";  // whatever stands behind it
    EXPECT_GT(renamed, watched.Last("fsync", beside)) << victim;
    EXPECT_GT(watched.Last("fsync", beside), watched.LastWrite(beside)) << victim;
    EXPECT_GT(watched.Last("fsync", layers), renamed) << "and its name";
    EXPECT_TRUE(VerifyLayer(image.path(), image.entry().id, &image.entry(), {}).damages.empty());
  }
}

#endif  // UNMOOR_FAULT_POINTS

}  // namespace
}  // namespace unmoor
