// The rooms' errors become the public codes.
#include "unmoor/status.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <memory>

#include "library/status_from.h"

namespace unmoor {
namespace {

TEST(Status, ErrorsBecomeCodes) {
  EXPECT_EQ(StatusFrom(UserError("a").value()).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(StatusFrom(UserError("a").value(), StatusCode::kDamaged).code(), StatusCode::kDamaged);
  const Status full = StatusFrom(SystemError(ENOSPC, "cannot write x").value());
  EXPECT_EQ(full.code(), StatusCode::kSystem);
  EXPECT_EQ(full.errnum(), ENOSPC);
  EXPECT_EQ(full.message(), "cannot write x: No space left on device");
  EXPECT_EQ(StatusFrom(SystemError(ENOMEM, "x").value()).code(), StatusCode::kNoMemory);
}

TEST(Status, ValueOrStatus) {
  StatusOr<std::unique_ptr<int>> good(std::make_unique<int>(3));
  ASSERT_TRUE(good.ok());
  EXPECT_EQ(**good, 3);
  const StatusOr<int> bad(Status(StatusCode::kBusy, "taken"));
  EXPECT_FALSE(bad.ok());
  EXPECT_EQ(bad.status().message(), "taken");
}

}  // namespace
}  // namespace unmoor
