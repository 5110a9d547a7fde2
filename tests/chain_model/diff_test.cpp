// Diff: what differs by task and VMA, and that shared layers are not read.
#include "store/diff.h"

#include "image_fixture.h"
#include "simulated_tree.h"
#include "store/flatten.h"

namespace unmoor {
namespace {

class DiffTest : public ::testing::Test {
 protected:
  void SetUp() override {
    before_[1].Map(0, 64);
    before_[1].Map(100, 110);
    for (uint64_t page = 0; page < 60; ++page) before_[1].pages[page] = page + 1;
    for (uint64_t page = 100; page < 110; ++page) before_[1].pages[page] = page;
    before_[2] = before_[1];
    before_[2].parent = 1;
    ASSERT_OK(DumpTree(before_, At("a"), std::nullopt));
    after_ = before_;
  }
  [[nodiscard]] std::string At(const std::string& name) const { return store_.path() + "/" + name; }
  DiffReport Run(const std::optional<std::string>& parent) {
    EXPECT_TRUE(DumpTree(after_, At("b"), parent).has_value());
    auto report = Diff(At("a"), At("b"));
    EXPECT_TRUE(report.has_value()) << (report ? "" : report.error().message());
    return report.value_or(DiffReport{});
  }

  const TemporaryDirectory store_;
  SimulatedTree before_;
  SimulatedTree after_;
};

TEST_F(DiffTest, NothingDiffersFromItselfAndNothingIsRead) {
  const DiffReport report = Run(At("a"));
  EXPECT_TRUE(report.tasks.empty());
  EXPECT_EQ(report.compared, Bytes(0));
  EXPECT_EQ(report.pages_before, report.pages_after);
}

TEST_F(DiffTest, ChangedPagesAreCountedWhereTheyAre) {
  after_[1].pages[3] = 999;
  after_[1].pages.erase(50);  // given back: reads zero
  after_[1].pages[62] = 0;    // a page of zeros where there was none is no difference
  for (const bool delta : {true, false}) {
    const DiffReport report = Run(delta ? std::optional(At("a")) : std::nullopt);
    ASSERT_EQ(report.tasks.size(), 1u);
    EXPECT_EQ(report.tasks[0].vpid, 1u);
    ASSERT_EQ(report.tasks[0].vmas.size(), 1u);
    EXPECT_EQ(report.tasks[0].vmas[0].changed, PageCount(2));
    EXPECT_EQ(report.changed, Bytes(2 * kPageSize));
    // Without a common layer the second task's pages are compared, too.
    EXPECT_TRUE(delta ? report.compared <= Bytes(4 * kPageSize)
                      : report.compared >= Bytes(100 * kPageSize));
    ASSERT_OK(RemoveTree(At("b")));
  }
}

TEST_F(DiffTest, FlatteningChangesNothing) {
  after_[1].pages[3] = 999;
  ASSERT_OK(DumpTree(after_, At("b"), At("a")));
  ASSERT_OK(Flatten({At("b"), At("c"), {}}));
  const auto report = Diff(At("b"), At("c"));
  ASSERT_OK(report);
  EXPECT_TRUE(report->tasks.empty());
}

TEST_F(DiffTest, VmasAndTasksThatCameOrWent) {
  after_.erase(2);
  after_[1].Unmap(100, 110);
  after_[1].Map(80, 90);
  after_[1].pages[80] = 5;
  after_[1].vmas[0] = 70;
  after_[1].pages[69] = 6;
  after_[3] = after_[1];
  after_[3].parent = 1;
  const DiffReport report = Run(At("a"));
  ASSERT_EQ(report.tasks.size(), 3u);
  const TaskDifference& first = report.tasks[0];
  ASSERT_EQ(first.vmas.size(), 3u);
  EXPECT_NE(first.vmas[0].before, first.vmas[0].after);  // grew
  EXPECT_EQ(first.vmas[0].changed, PageCount(1));
  EXPECT_FALSE(first.vmas[1].before);  // is new
  EXPECT_EQ(first.vmas[1].changed, PageCount(1));
  EXPECT_FALSE(first.vmas[2].after);  // is gone
  EXPECT_EQ(first.vmas[2].changed, PageCount(10));
  EXPECT_FALSE(report.tasks[1].after);
  EXPECT_FALSE(report.tasks[2].before);
}

}  // namespace
}  // namespace unmoor
