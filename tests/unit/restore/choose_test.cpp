// Which mode --mode auto takes: one rule after the other, and each says why.
#include "restore/choose.h"

#include <gmock/gmock.h>

namespace unmoor {
namespace {

using ::testing::HasSubstr;

constexpr Bytes kMiB(uint64_t{1} << 20);

ModeFacts Warm() {
  ModeFacts facts;
  facts.data = Bytes(1024 * kMiB.value);
  facts.cached = facts.data;
  return facts;
}

void ExpectChoice(const ModeFacts& facts, RestoreMode mode, const char* why) {
  const ModeChoice choice = ChooseMode(facts);
  EXPECT_STREQ(ToString(choice.mode), ToString(mode));
  EXPECT_THAT(choice.why, HasSubstr(why));
}

TEST(ChooseMode, WhatIsCachedIsMapped) {
  ExpectChoice(Warm(), RestoreMode::kDirect, "100 % of its 1.0 GiB are in the page cache");
}

TEST(ChooseMode, WhatIsNotComesWhenItIsTouched) {
  ModeFacts facts = Warm();
  facts.cached = Bytes(100 * kMiB.value);
  ExpectChoice(facts, RestoreMode::kLazy, "9 % of its 1.0 GiB are in the page cache");
  facts.cached.reset();
  ExpectChoice(facts, RestoreMode::kDirect, "does not tell");
  facts.storage = Storage::kMemory;
  ExpectChoice(facts, RestoreMode::kDirect, "in memory");
}

TEST(ChooseMode, WhatIsPackedIsNotUnpackedFirst) {
  ModeFacts facts = Warm();
  facts.packed = true;
  ExpectChoice(facts, RestoreMode::kLazy, "its 1.0 GiB would have to be unpacked");
  facts.storage = Storage::kMemory;
  ExpectChoice(facts, RestoreMode::kLazy, "packed");
  facts.data = kMiB;
  ExpectChoice(facts, RestoreMode::kEager, "little");
}

TEST(ChooseMode, LittleIsThereAtOnce) {
  ModeFacts facts = Warm();
  facts.data = kMiB;
  facts.cached = Bytes();
  ExpectChoice(facts, RestoreMode::kEager, "1.0 MiB are little");
  facts.data = Bytes();
  ExpectChoice(facts, RestoreMode::kEager, "little");
}

TEST(ChooseMode, ARunningProgramDoesNotDependOnANetwork) {
  ModeFacts facts = Warm();
  facts.storage = Storage::kNetwork;
  ExpectChoice(facts, RestoreMode::kEager, "network file system");
}

TEST(ChooseMode, WithoutMemoryForAllOfItItStaysMapped) {
  ModeFacts facts = Warm();
  facts.storage = Storage::kNetwork;
  facts.lacks_room = "the machine has no more than 1.0 MiB of memory to spare";
  ExpectChoice(facts, RestoreMode::kDirect, "no more than 1.0 MiB");
}

TEST(ChooseMode, WhatCannotBeWatchedIsThereBeforeItRuns) {
  ModeFacts facts = Warm();
  facts.can_watch = false;
  facts.lacks_room = "none";
  ExpectChoice(facts, RestoreMode::kEager, "cannot be watched");
}

}  // namespace
}  // namespace unmoor
