#include "criu/image_codec.h"

#include <gmock/gmock.h>

namespace unmoor::criu {
namespace {

using ::testing::HasSubstr;

std::string TwoMessages() {
  ImageBuilder builder(ImageType::kPstree);
  builder.Append("first");
  builder.Append("");
  return builder.data();
}

TEST(ImageCodec, WhatWasBuiltIsReadBack) {
  const auto image = RawImage::Parse(TwoMessages(), ImageType::kPstree, "x.img");
  ASSERT_TRUE(image) << image.error().message();
  ASSERT_EQ(image->messages().size(), 2u);
  EXPECT_EQ(image->messages()[0].bytes, "first");
  EXPECT_EQ(image->messages()[0].offset, FileOffset(8));
  EXPECT_EQ(image->messages()[1].bytes, "");
  EXPECT_EQ(image->messages()[1].offset, FileOffset(17));
}

TEST(ImageCodec, InventoryHasOneMagicOnly) {
  ImageBuilder builder(ImageType::kInventory);
  builder.Append("ab");
  EXPECT_EQ(builder.data().size(), 4u + 4u + 2u);
  EXPECT_TRUE(RawImage::Parse(builder.data(), ImageType::kInventory, "inventory.img"));
}

TEST(ImageCodec, EveryTruncationIsRefusedOrEndsBetweenMessages) {
  const std::string whole = TwoMessages();
  for (size_t size = 0; size < whole.size(); ++size) {
    const auto image = RawImage::Parse(whole.substr(0, size), ImageType::kPstree, "x.img");
    const bool between = size == 8 || size == 17;
    EXPECT_EQ(image.has_value(), between) << size;
    if (!image) {
      EXPECT_THAT(image.error().message(), HasSubstr("x.img"));
    }
  }
}

TEST(ImageCodec, AnotherTypeIsRefusedWithFileAndOffset) {
  const auto image = RawImage::Parse(TwoMessages(), ImageType::kMm, "mm-1.img");
  ASSERT_FALSE(image);
  EXPECT_THAT(image.error().message(), HasSubstr("mm-1.img"));
  EXPECT_THAT(image.error().message(), HasSubstr("offset 4"));
  EXPECT_EQ(image.error().kind(), ErrorKind::kUser);
}

TEST(ImageCodec, AbsurdLengthIsRefusedBeforeItIsUsed) {
  std::string data = TwoMessages();
  data.replace(8, 4, "\xff\xff\xff\xff");
  const auto image = RawImage::Parse(data, ImageType::kPstree, "x.img");
  ASSERT_FALSE(image);
  EXPECT_THAT(image.error().message(), HasSubstr("offset 8"));
}

}  // namespace
}  // namespace unmoor::criu
