// The journal and the state that follows from it, as a keeper finds them.
#include "lazy/state.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

namespace unmoor {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

VaddrRange MiB(uint64_t begin, uint64_t count) {
  return {Vaddr(begin * kMiB), Vaddr((begin + count) * kMiB)};
}

LazyImage OneTask() {
  LazyImage image;
  image.tasks.push_back({7, {{MiB(16, 4), 0, FileOffset(0)}}});
  return image;
}

LazyJournal MakeJournal() {
  auto journal = LazyJournal::Create();
  EXPECT_TRUE(journal) << journal.error().message();
  return *journal;
}

TEST(LazyJournal, OutlivesTheProcessThatWroteIt) {
  LazyJournal journal = MakeJournal();
  const pid_t writer = ::fork();
  if (writer == 0) {
    journal.Append({.kind = LazyRecord::Kind::kTask, .uffd = 900, .vpid = 7});
    journal.BeginReading();
    journal.Append({.kind = LazyRecord::Kind::kGivenBack, .uffd = 900, .range = MiB(17, 1)});
    journal.EndReading();
    journal.BeginReading();
    ::_exit(0);
  }
  ASSERT_EQ(::waitpid(writer, nullptr, 0), writer);
  EXPECT_FALSE(journal.whole());  // it died between reading an event and recording it
  const LazyImage image = OneTask();
  LazyState state(image);
  for (const LazyRecord& record : journal.records()) state.Apply(record);
  ASSERT_EQ(state.spaces().size(), 1u);
  EXPECT_EQ(state.spaces().front().memory.total().value, 4 * kMiB);
  EXPECT_EQ(state.spaces().front().memory.given_back().value, kMiB);
}

TEST(LazyState, AChildNeedsWhatItsParentNeededWhenItWasBorn) {
  const LazyImage image = OneTask();
  LazyState state(image);
  state.Apply({.kind = LazyRecord::Kind::kTask, .uffd = 900, .vpid = 7});
  state.Apply({.kind = LazyRecord::Kind::kGivenBack, .uffd = 900, .range = MiB(16, 1)});
  state.Apply({.kind = LazyRecord::Kind::kForked, .uffd = 901, .parent_uffd = 900});
  state.Apply({.kind = LazyRecord::Kind::kGivenBack, .uffd = 900, .range = MiB(16, 4)});
  ASSERT_EQ(state.spaces().size(), 2u);
  EXPECT_TRUE(state.spaces().front().memory.complete());
  EXPECT_TRUE(state.spaces().back().forked);
  EXPECT_EQ(state.spaces().back().memory.total().value, 3 * kMiB);
  state.Apply({.kind = LazyRecord::Kind::kClosed, .uffd = 900});
  EXPECT_EQ(state.spaces().size(), 1u);
}

}  // namespace
}  // namespace unmoor
