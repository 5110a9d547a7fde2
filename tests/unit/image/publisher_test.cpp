// Publication: all or nothing, whatever happens in between.
#include "image/publisher.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>

#include "image_fixture.h"
#include "os/fd.h"

namespace unmoor {
namespace {

// A checkpoint whose parts all say `word`.
void FillCheckpoint(const std::string& dir, const std::string& word) {
  ASSERT_OK(
      WriteFile(ManifestPath(dir), "{\"format\": \"unmoor checkpoint\", \"" + word + "\": 1}"));
  ASSERT_OK(MakeDirectory(CriuDirectory(dir)));
  ASSERT_OK(MakeDirectory(LayersDirectory(dir)));
  ASSERT_OK(WriteFile(CriuDirectory(dir) + "/inventory.img", word));
  ASSERT_OK(WriteFile(LayersDirectory(dir) + "/x.pages", std::string(8192, word[0])));
  ASSERT_OK(SymbolicLink("nowhere", CriuDirectory(dir) + "/parent"));
}

std::string WordOf(const std::string& dir) {
  const auto word = ReadFile(CriuDirectory(dir) + "/inventory.img");
  const auto manifest = ReadFile(ManifestPath(dir));
  const auto layer = ReadFile(LayersDirectory(dir) + "/x.pages");
  if (!word || !manifest || !layer) return "";
  EXPECT_NE(manifest->find(*word), std::string::npos);
  EXPECT_EQ(*layer, std::string(8192, (*word)[0]));
  return *word;
}

void PublishWord(const std::string& dir, const std::string& word) {
  auto publisher = Publisher::Begin(dir);
  ASSERT_OK(publisher);
  FillCheckpoint(publisher->path(), word);
  ASSERT_OK(publisher->Publish());
}

std::vector<std::string> Names(const TemporaryDirectory& dir) {
  return ListDirectory(dir.path()).value();
}

using Strings = std::vector<std::string>;

TEST(Publisher, NewDirectoryAppearsComplete) {
  const TemporaryDirectory parent;
  PublishWord(parent.path() + "/image", "first");
  EXPECT_EQ(WordOf(parent.path() + "/image"), "first");
  EXPECT_EQ(Names(parent), Strings{"image"});
}

TEST(Publisher, OlderCheckpointIsReplaced) {
  const TemporaryDirectory parent;
  PublishWord(parent.path() + "/image", "first");
  PublishWord(parent.path() + "/image/", "second");
  EXPECT_EQ(WordOf(parent.path() + "/image"), "second");
  EXPECT_EQ(Names(parent), Strings{"image"});
}

TEST(Publisher, EmptyDirectoryIsTaken) {
  const TemporaryDirectory parent;
  ASSERT_OK(MakeDirectory(parent.path() + "/image"));
  PublishWord(parent.path() + "/image", "first");
  EXPECT_EQ(WordOf(parent.path() + "/image"), "first");
}

TEST(Publisher, LinkToADirectoryStaysALink) {
  const TemporaryDirectory parent;
  ASSERT_OK(MakeDirectory(parent.path() + "/real"));
  ASSERT_OK(SymbolicLink("real", parent.path() + "/image"));
  PublishWord(parent.path() + "/image", "first");
  EXPECT_EQ(WordOf(parent.path() + "/real"), "first");
  EXPECT_EQ(WordOf(parent.path() + "/image"), "first");
}

TEST(Publisher, UnpublishedLeavesNothing) {
  const TemporaryDirectory parent;
  PublishWord(parent.path() + "/image", "first");
  {
    auto publisher = Publisher::Begin(parent.path() + "/image");
    ASSERT_OK(publisher);
    FillCheckpoint(publisher->path(), "second");
    EXPECT_EQ(Names(parent).size(), 2u);
  }
  EXPECT_EQ(Names(parent), Strings{"image"});
  EXPECT_EQ(WordOf(parent.path() + "/image"), "first");
}

TEST(Publisher, RefusesWhatItMustNotReplace) {
  const TemporaryDirectory parent;
  const auto refused = [&](const std::string& name, const std::string& words) {
    const auto publisher = Publisher::Begin(parent.path() + name);
    ASSERT_FALSE(publisher) << name;
    EXPECT_EQ(publisher.error().kind(), ErrorKind::kUser);
    EXPECT_NE(publisher.error().message().find(words), std::string::npos)
        << publisher.error().message();
  };
  refused("/none/image", "does not exist");
  ASSERT_OK(WriteFile(parent.path() + "/file", "x"));
  refused("/file", "is not a directory");
  ASSERT_OK(MakeDirectory(parent.path() + "/full"));
  ASSERT_OK(WriteFile(parent.path() + "/full/letter.txt", "dear"));
  refused("/full", "is not empty");
  PublishWord(parent.path() + "/image", "first");
  ASSERT_OK(WriteFile(parent.path() + "/image/letter.txt", "dear"));
  refused("/image", "is not empty and holds more than");
  EXPECT_EQ(Slurp(parent.path() + "/image/letter.txt"), "dear");
  EXPECT_EQ(Names(parent), (Strings{"file", "full", "image"}));
}

TEST(Publisher, MountPointIsRefused) {
  const auto publisher = Publisher::Begin("/proc");
  ASSERT_FALSE(publisher);
  EXPECT_NE(publisher.error().message().find("mount point"), std::string::npos);
}

TEST(Publisher, TwoCannotPublishToOneDirectoryAtOnce) {
  const TemporaryDirectory parent;
  auto first = Publisher::Begin(parent.path() + "/image");
  ASSERT_OK(first);
  const auto second = Publisher::Begin(parent.path() + "/image");
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().kind(), ErrorKind::kUser);
  EXPECT_NE(second.error().message().find("another command"), std::string::npos);
  ASSERT_OK(Publisher::Begin(parent.path() + "/other"));
  FillCheckpoint(first->path(), "first");
  ASSERT_OK(first->Publish());
  EXPECT_EQ(WordOf(parent.path() + "/image"), "first");
}

TEST(Publisher, LeftoversOfKilledCommandsAreRemoved) {
  const TemporaryDirectory parent;
  for (const char* name :
       {"/image.partial-AbC123", "/image.partial-keepme.txt", "/x.partial-AbC123"}) {
    ASSERT_OK(MakeDirectory(parent.path() + name));
  }
  FillCheckpoint(parent.path() + "/image.partial-AbC123", "old");
  PublishWord(parent.path() + "/image", "first");
  EXPECT_EQ(Names(parent), (Strings{"image", "image.partial-keepme.txt", "x.partial-AbC123"}));
}

TEST(Publisher, MappedLayerOfTheReplacedCheckpointStaysReadable) {
  const TemporaryDirectory parent;
  const std::string image = parent.path() + "/image";
  PublishWord(image, "first");
  const Fd fd = OpenFile(LayersDirectory(image) + "/x.pages", O_RDONLY).value();
  const Mapping mapping = Mapping::OfFile(fd.get(), 0, 8192).value();
  PublishWord(image, "second");
  for (const std::byte byte : mapping.bytes()) ASSERT_EQ(byte, std::byte{'f'});
}

TEST(Publisher, SomebodyElsesFilesThatAppearMeanwhileAreKept) {
  const TemporaryDirectory parent;
  auto publisher = Publisher::Begin(parent.path() + "/image");
  ASSERT_OK(publisher);
  FillCheckpoint(publisher->path(), "first");
  ASSERT_OK(MakeDirectory(parent.path() + "/image"));
  ASSERT_OK(WriteFile(parent.path() + "/image/letter.txt", "dear"));
  EXPECT_FALSE(publisher->Publish());
  EXPECT_EQ(Slurp(parent.path() + "/image/letter.txt"), "dear");
}

TEST(Publisher, DISABLED_ChildPublishes) {
  auto publisher = Publisher::Begin(std::string(std::getenv("UNMOOR_TEST_DIR")) + "/image");
  ASSERT_OK(publisher);
  FillCheckpoint(publisher->path(), "second");
  ASSERT_FALSE(publisher->Publish());
}

struct FaultCase {
  const char* point;
  const char* before;  // word in DIR beforehand, "" for no DIR
  const char* after;
};

class PublisherFault : public ::testing::TestWithParam<FaultCase> {
 protected:
  void Prepare() {
    if (*GetParam().before != '\0') PublishWord(parent_.path() + "/image", GetParam().before);
  }
  int Run(const std::string& action) {
    return RunHiddenTest("Publisher.DISABLED_ChildPublishes", GetParam().point + (":" + action),
                         parent_.path());
  }
  void ExpectOldOrNew() {
    EXPECT_EQ(WordOf(parent_.path() + "/image"), GetParam().after);
    EXPECT_EQ(Exists(parent_.path() + "/image"), *GetParam().after != '\0');
  }
  const TemporaryDirectory parent_;
};

TEST_P(PublisherFault, PublishIsAllOrNothingWhenKilled) {
  Prepare();
  const int status = Run("kill");
  ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  ExpectOldOrNew();
  PublishWord(parent_.path() + "/image", "third");
  EXPECT_EQ(WordOf(parent_.path() + "/image"), "third");
  EXPECT_EQ(Names(parent_), Strings{"image"});
}

TEST_P(PublisherFault, PublishIsAllOrNothingOnError) {
  Prepare();
  ASSERT_EQ(Run("error"), 0);
  ExpectOldOrNew();
  EXPECT_EQ(Names(parent_), *GetParam().after != '\0' ? Strings{"image"} : Strings{});
}

INSTANTIATE_TEST_SUITE_P(EveryPoint, PublisherFault,
                         ::testing::Values(FaultCase{"publish.before_sync", "", ""},
                                           FaultCase{"publish.before_rename", "", ""},
                                           FaultCase{"publish.after_rename", "", "second"},
                                           FaultCase{"publish.before_sync", "first", "first"},
                                           FaultCase{"publish.before_rename", "first", "first"},
                                           FaultCase{"publish.after_rename", "first", "second"}),
                         [](const auto& info) {
                           std::string name = info.param.point;
                           std::ranges::replace(name, '.', '_');
                           return name + (*info.param.before != '\0' ? "_over_old" : "_new");
                         });

}  // namespace
}  // namespace unmoor
