// The manifest: what is written is read, and nothing else is.
#include "image/manifest.h"

#include <xxhash.h>

#include <nlohmann/json.hpp>

#include "image/publisher.h"
#include "image_fixture.h"

namespace unmoor {
namespace {

class ManifestTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto info = MakeTestLayer(LayersDirectory(dir_.path()));
    ASSERT_OK(info);
    manifest_ = MakeTestManifest(*info);
    ASSERT_OK(WriteManifest(dir_.path(), manifest_));
    text_ = Slurp(ManifestPath(dir_.path()));
  }

  // The message of reading `text`.
  static std::string ErrorOf(const std::string& text) {
    const auto parsed = ParseManifest(text, "m.json");
    if (parsed) return "no error";
    EXPECT_EQ(parsed.error().kind(), ErrorKind::kUser);
    EXPECT_EQ(parsed.error().message().find('\n'), std::string::npos);
    EXPECT_EQ(parsed.error().message().find("m.json"), 0u);
    return parsed.error().message();
  }

  const TemporaryDirectory dir_;
  Manifest manifest_;
  std::string text_;
};

TEST_F(ManifestTest, IsReadAsWritten) {
  const auto read = ReadManifest(dir_.path());
  ASSERT_OK(read);
  EXPECT_EQ(*read, manifest_);
  EXPECT_TRUE(nlohmann::json::parse(text_, nullptr, false).is_object());
}

TEST_F(ManifestTest, ManifestWithOneChangedByteIsRefused) {
  for (size_t i = 0; i < text_.size(); ++i) {
    for (const int flip : {0x01, 0x20, 0x80}) {
      std::string bad = text_;
      bad[i] = static_cast<char>(bad[i] ^ flip);
      ASSERT_FALSE(ParseManifest(bad, "m.json")) << "byte " << i << " ^ " << flip;
    }
  }
}

TEST_F(ManifestTest, TruncatedOrExtendedManifestIsRefused) {
  for (size_t i = 0; i < text_.size(); ++i) {
    ASSERT_FALSE(ParseManifest(text_.substr(0, i), "m.json")) << i;
  }
  EXPECT_NE(ErrorOf(text_ + "\n"), "no error");
}

TEST_F(ManifestTest, OtherFormatVersionIsNamed) {
  const size_t at = text_.find("\"format_version\": 1");
  std::string other = text_;
  other.replace(at, 19, "\"format_version\": 7");
  EXPECT_EQ(ErrorOf(other), "m.json: format version 7 is not one this unmoor (1) reads");
}

TEST_F(ManifestTest, NamesThatAreNotUtf8DoNotBreakIt) {
  manifest_.tasks[0].vmas[0].name = "/tmp/\xff\xfe";
  const auto text = EncodeManifest(manifest_);
  ASSERT_OK(text);
  ASSERT_OK(ParseManifest(*text, "m.json"));
}

// A wrong value is refused when written too: by the same checks.
TEST_F(ManifestTest, ValuesOutOfRangeAreRefused) {
  const auto refused = [&](auto change, const std::string& word) {
    Manifest manifest = manifest_;
    change(manifest);
    const auto text = EncodeManifest(manifest);
    ASSERT_FALSE(text) << word;
    EXPECT_NE(text.error().message().find(word), std::string::npos) << text.error().message();
  };
  refused([](Manifest& m) { m.checkpoint_id = "../x"; }, "checkpoint_id");
  refused([](Manifest& m) { m.parent_id = ""; }, "parent_id");
  refused([](Manifest& m) { m.root_vpid = 99; }, "root_vpid");
  refused([](Manifest& m) { m.page_size = 16384; }, "page_size");
  refused([](Manifest& m) { m.cpu_features = {"b", "a"}; }, "cpu_features");
  refused([](Manifest& m) { m.layers[0].id = "x"; }, "layers[0].id");
  refused([](Manifest& m) { m.layers[0].pages_size = Bytes(0); }, "layers[0]");
  refused([](Manifest& m) { m.tasks[1].vpid = m.tasks[0].vpid; }, "tasks[1].vpid came before");
  refused([](Manifest& m) { m.tasks[0].vpid = 0; }, "tasks[0].vpid");
  refused([](Manifest& m) { m.tasks[0].vmas[0].layer = 1; }, "tasks[0].vmas[0].layer");
  refused([](Manifest& m) { m.tasks[0].vmas[0].offset = FileOffset(0); }, "modulo 2 MiB");
  refused(
      [](Manifest& m) { m.tasks[0].vmas[0].offset = FileOffset((uint64_t{7} << 40) + 0x123000); },
      "beyond the end of the layer");
  refused([](Manifest& m) { std::swap(m.tasks[0].vmas[0], m.tasks[0].vmas[1]); }, "out of order");
  refused([](Manifest& m) { m.tasks[0].vmas[2].data = Bytes(1 << 30); }, "data_bytes");
}

// `text` with `from` replaced by `to` and the checksum made right again.
std::string Resealed(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  text.replace(at, from.size(), to);
  text.resize(text.rfind("  \"checksum\""));
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(text.data(), text.size()));
  text += "  \"checksum\": \"";
  for (const unsigned char byte : canonical.digest) text += fmt::format("{:02x}", byte);
  return text + "\"\n}\n";
}

TEST_F(ManifestTest, UnknownMissingAndMistypedMembersAreRefused) {
  EXPECT_EQ(ErrorOf(Resealed(text_, "\"root_vpid\": 7", "\"root_vpid\": 7")), "no error");
  EXPECT_EQ(ErrorOf(Resealed(text_, "\"root_vpid\": 7", "\"root_vpid\": 7,\n  \"x\": 1")),
            "m.json: the whole has members this format does not know");
  EXPECT_EQ(ErrorOf(Resealed(text_, "  \"root_vpid\": 7,\n", "")), "m.json: root_vpid is missing");
  EXPECT_EQ(ErrorOf(Resealed(text_, "\"root_vpid\": 7", "\"root_vpid\": -7")),
            "m.json: root_vpid is not a whole number");
  EXPECT_EQ(ErrorOf(Resealed(text_, "\"prot\": \"rw-\"", "\"prot\": \"w--\"")),
            "m.json: tasks[0].vmas[0].prot is no protection");
  EXPECT_EQ(ErrorOf(Resealed(text_, "\"start\": \"0x", "\"start\": \"0y")),
            "m.json: tasks[0].vmas[0].start is not a hexadecimal number");
  EXPECT_EQ(ErrorOf(Resealed(text_, "\"layers\": [", "\"layers\": [1, ")),
            "m.json: layers[0] is not an object");
  EXPECT_EQ(ErrorOf(Resealed(text_, "\"tasks\": 2", "\"tasks\": 3")),
            "m.json: totals do not add up");
}

// The manifest of an image of memory with a delta; `change` may spoil it.
template <class Change>
std::string MemoryManifestError(Manifest manifest, Change change) {
  manifest.kind = ImageKind::kMemory;
  manifest.criu_version.clear();
  manifest.tasks.resize(1);
  manifest.tasks[0].vpid = manifest.root_vpid = kMemoryTask;
  manifest.tasks[0].vmas.resize(2);
  manifest.layers.push_back(manifest.layers[0]);
  manifest.tasks[0].vmas[0].deltas = {{1, manifest.tasks[0].vmas[0].offset}};
  manifest.user_data = ManifestUserData{Bytes(5), 17};
  change(manifest);
  const auto text = EncodeManifest(manifest);
  if (!text) return text.error().message();
  const auto parsed = ParseManifest(*text, "m.json");
  return !parsed ? parsed.error().message() : *parsed == manifest ? "" : "read differently";
}

TEST_F(ManifestTest, MemoryImagesAndDeltasAreReadAsWritten) {
  EXPECT_EQ(MemoryManifestError(manifest_, [](Manifest&) {}), "");
}

TEST_F(ManifestTest, InconsistentMemoryImagesAndDeltasAreRefused) {
  const auto error = [&](auto change) { return MemoryManifestError(manifest_, change); };
  EXPECT_NE(error([](Manifest& m) { m.tasks.push_back(m.tasks[0]); }), "");
  EXPECT_NE(error([](Manifest& m) { m.tasks[0].vpid = m.root_vpid = 2; }), "");
  EXPECT_NE(error([](Manifest& m) { m.tasks[0].vmas[1].kind = VmaKind::kCriu; }), "");
  EXPECT_NE(error([](Manifest& m) { m.tasks[0].vmas[0].deltas[0].layer = 0; }), "");
  EXPECT_NE(error([](Manifest& m) { m.tasks[0].vmas[0].deltas[0].layer = 2; }), "");
  EXPECT_NE(error([](Manifest& m) {
              auto& offset = m.tasks[0].vmas[0].deltas[0].offset;
              offset = offset + Bytes(4096);
            }),
            "");
  EXPECT_NE(
      error([](Manifest& m) { m.tasks[0].vmas[0].deltas[0].offset = FileOffset(kMaxLayerSize); }),
      "");
  EXPECT_NE(error([](Manifest& m) { m.user_data->size = kMaxUserData + Bytes(1); }), "");
}

TEST_F(ManifestTest, UserDataIsComparedWithItsHash) {
  const auto entry = WriteUserData(dir_.path(), "roots\n");
  ASSERT_OK(entry);
  EXPECT_EQ(ReadUserData(dir_.path(), *entry).value(), "roots\n");
  EXPECT_TRUE(IsCheckpointDirectory(dir_.path()).value());
  ASSERT_OK(WriteFile(UserDataPath(dir_.path()), "Roots\n"));
  EXPECT_FALSE(ReadUserData(dir_.path(), *entry));
  ASSERT_OK(WriteFile(UserDataPath(dir_.path()), "roots"));
  EXPECT_FALSE(ReadUserData(dir_.path(), *entry));
  ASSERT_OK(RemoveFile(UserDataPath(dir_.path())));
  EXPECT_FALSE(ReadUserData(dir_.path(), *entry));
}

TEST_F(ManifestTest, SaysWhatADirectoryIs) {
  const TemporaryDirectory other;
  const auto message = [](const std::string& dir) {
    const auto manifest = ReadManifest(dir);
    return manifest ? "no error" : manifest.error().message();
  };
  EXPECT_EQ(message(other.path() + "/none"), other.path() + "/none does not exist");
  EXPECT_EQ(message(other.path()), other.path() + " is empty; it holds no checkpoint");
  ASSERT_OK(WriteFile(other.path() + "/file", "x"));
  EXPECT_EQ(message(other.path() + "/file"), other.path() + "/file is not a directory");
  EXPECT_EQ(message(other.path()), other.path() + " holds no checkpoint (no manifest.json in it)");
  ASSERT_OK(WriteFile(other.path() + "/inventory.img", "x"));
  EXPECT_NE(message(other.path()).find("is a stock CRIU image directory"), std::string::npos);
  ASSERT_OK(WriteFile(other.path() + "/manifest.json", "{}"));
  EXPECT_NE(message(other.path()).find("is not a manifest of unmoor"), std::string::npos);
}

TEST_F(ManifestTest, MissingCpuFeaturesAreNamed) {
  HostFacts host;
  host.cpu_features = {"fpu"};
  const auto checked = CheckHost(manifest_, host);
  ASSERT_FALSE(checked);
  EXPECT_NE(checked.error().message().find("avx2 sse4_2"), std::string::npos);
  host.cpu_features = {"aes", "avx2", "fpu", "sse4_2"};
  EXPECT_TRUE(CheckHost(manifest_, host));
}

TEST(Host, FactsAreRead) {
  const auto host = ReadHostFacts();
  ASSERT_OK(host);
  EXPECT_FALSE(host->kernel_release.empty());
  EXPECT_TRUE(std::ranges::is_sorted(host->cpu_features));
  EXPECT_FALSE(host->cpu_features.empty());
}

}  // namespace
}  // namespace unmoor
