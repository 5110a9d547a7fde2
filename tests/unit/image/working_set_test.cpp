// Working sets: written and read back; whatever else the bytes are, they are refused.
#include "image/working_set.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <string>
#include <vector>

#include "base/little_endian.h"

namespace unmoor {
namespace {

using testing::HasSubstr;

WorkingSet Example() {
  return {{std::string(32, 'a'), "0123456789abcdef0123456789abcdef"},
          {{1, {FileOffset(2 << 20), FileOffset((2 << 20) + 65536)}},
           {0, {FileOffset(4096), FileOffset(8192)}},
           {1, {FileOffset(0), FileOffset(4096)}}}};
}

// With a right checksum, so that what lies behind it is looked at.
Result<WorkingSet> DecodeChanged(size_t at, uint64_t value) {
  std::vector<std::byte> bytes = EncodeWorkingSet(Example());
  PutLittleEndian(std::span(bytes), at, value);
  PutLittleEndian(std::span(bytes), bytes.size() - 8,
                  static_cast<uint64_t>(XXH3_64bits(bytes.data(), bytes.size() - 8)));
  return DecodeWorkingSet(bytes, "set");
}

TEST(WorkingSetTest, IsReadAsItWasWritten) {
  const auto set = DecodeWorkingSet(EncodeWorkingSet(Example()), "set");
  ASSERT_TRUE(set) << set.error().message();
  EXPECT_EQ(*set, Example());
  EXPECT_EQ(set->size(), Bytes(65536 + 4096 + 4096));
  EXPECT_TRUE(DecodeWorkingSet(EncodeWorkingSet({}), "set"));
}

TEST(WorkingSetTest, EveryFlippedByteAndEveryTruncationIsRefused) {
  const std::vector<std::byte> good = EncodeWorkingSet(Example());
  for (size_t at = 0; at < good.size(); ++at) {
    std::vector<std::byte> bytes = good;
    bytes[at] ^= std::byte{0x20};
    EXPECT_FALSE(DecodeWorkingSet(bytes, "set")) << at;
    EXPECT_FALSE(DecodeWorkingSet(std::span(good).first(at), "set")) << at;
  }
}

TEST(WorkingSetTest, NumbersThatCannotBeAreRefusedUnderARightChecksum) {
  constexpr size_t kRanges = 48 + 2 * 16;
  const std::vector<std::pair<size_t, uint64_t>> bad = {
      {16, uint64_t{1} << 60},        // layers
      {16, 1},                        // fewer than there are
      {24, uint64_t{1} << 60},        // ranges
      {24, (uint64_t{1} << 20) + 1},  //
      {32, 4096},                     // bytes
      {40, 1},                        // reserved
      {kRanges, 2},                   // a range of no layer
      {kRanges + 8, 100},             // unaligned
      {kRanges + 8, uint64_t{1} << 60},
      {kRanges + 16, 0},
      {kRanges + 16, ~uint64_t{4095}},
  };
  for (const auto& [at, value] : bad) {
    const auto set = DecodeChanged(at, value);
    ASSERT_FALSE(set) << at << " " << value;
    EXPECT_THAT(set.error().message(), HasSubstr("set is damaged at offset")) << at;
  }
  const auto other = DecodeChanged(8, uint64_t{48} << 32 | 7);
  ASSERT_FALSE(other);
  EXPECT_THAT(other.error().message(), HasSubstr("format version 7"));
}

TEST(WorkingSetTest, ItsLayersAreTheManifests) {
  Manifest manifest;
  manifest.layers = {{std::string(32, 'a'), Bytes(2 << 20), {}, {}, 0},
                     {"0123456789abcdef0123456789abcdef", Bytes(4 << 20), {}, {}, 0}};
  EXPECT_TRUE(CheckWorkingSet(Example(), manifest, "set"));
  manifest.layers[1].pages_size = Bytes(2 << 20);
  EXPECT_FALSE(CheckWorkingSet(Example(), manifest, "set"));
  manifest.layers.pop_back();
  EXPECT_FALSE(CheckWorkingSet(Example(), manifest, "set"));
}

}  // namespace
}  // namespace unmoor
