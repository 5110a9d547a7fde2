// The base room: results, units, fault points.
#include <gtest/gtest.h>

#include <cerrno>
#include <cstdlib>

#include "base/fault_point.h"
#include "base/result.h"
#include "base/units.h"

namespace unmoor {
namespace {

Result<int> Half(int n) {
  if (n % 2 != 0) return UserError("{} is odd", n);
  return n / 2;
}

Result<int> Quarter(int n) {
  UNMOOR_ASSIGN(const int half, Half(n));
  return Half(half);
}

TEST(Result, ErrorsTravelUpWithTheirKind) {
  EXPECT_EQ(Quarter(8).value(), 2);
  const auto odd = Quarter(6);
  ASSERT_FALSE(odd);
  EXPECT_EQ(odd.error().kind(), ErrorKind::kUser);
  EXPECT_EQ(odd.error().message(), "3 is odd");
  EXPECT_EQ(odd.error().WithContext("halving").message(), "halving: 3 is odd");
}

TEST(Result, SystemErrorsKeepTheErrno) {
  const Result<> result = SystemError(ENOSPC, "cannot write x");
  EXPECT_EQ(result.error().errnum(), ENOSPC);
  EXPECT_EQ(result.error().kind(), ErrorKind::kMachine);
  EXPECT_EQ(result.error().message(), "cannot write x: No space left on device");
}

TEST(ResultDeathTest, ABrokenInvariantAbortsWithOneLine) {
  EXPECT_DEATH(UNMOOR_CHECK(1 > 2), "unmoor: bug: .*1 > 2 does not hold");
}

TEST(Units, RangesAreHalfOpen) {
  const VaddrRange range{Vaddr(0x1000), Vaddr(0x3000)};
  EXPECT_TRUE(range.Contains(Vaddr(0x1000)));
  EXPECT_FALSE(range.Contains(Vaddr(0x3000)));
  EXPECT_TRUE(range.Contains(range));
  EXPECT_EQ(range.size(), Bytes(0x2000));
  EXPECT_EQ(fmt::format("{}", range), "1000-3000");
}

TEST(Units, AreHumanReadable) {
  EXPECT_EQ(HumanBytes(Bytes(512)), "512 B");
  EXPECT_EQ(HumanBytes(Bytes(64 << 10)), "64.0 KiB");
  EXPECT_EQ(HumanBytes(Bytes(uint64_t{4} << 30)), "4.0 GiB");
  EXPECT_EQ(HumanTime(Nanos(740)), "740 ns");
  EXPECT_EQ(HumanTime(Nanos(4'100'000)), "4.1 ms");
}

TEST(Units, Align) {
  EXPECT_EQ(AlignUp(1, kPageSize), kPageSize);
  EXPECT_EQ(AlignUp(kPageSize, kPageSize), kPageSize);
  EXPECT_EQ(AlignDown(kPageSize + 1, kPageSize), kPageSize);
}

TEST(FaultPoints, AreQuietUnlessArmed) {
  EXPECT_TRUE(FaultPoint("base.test"));
}

#ifdef UNMOOR_FAULT_POINTS
// In a process of its own: the environment is read at the first passage.
TEST(FaultPointsDeathTest, ActAtThePassageTheyAreArmedFor) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        ::setenv("UNMOOR_FAULT", "base.second:error@2,base.every:error@*,base.first:error", 1);
        const auto fails = [](const char* name) { return !FaultPoint(name); };
        const bool right = !fails("base.second") && fails("base.second") && !fails("base.second") &&
                           fails("base.every") && fails("base.every") && fails("base.first") &&
                           !fails("base.first") && !fails("base.other");
        std::_Exit(right ? 0 : 1);
      },
      testing::ExitedWithCode(0), "");
}
#endif

}  // namespace
}  // namespace unmoor
