// The C API, called from C.
#include "c_api_calls.h"
#include "library_fixture.h"

namespace unmoor {
namespace {

std::string Problem(const char* problem) {
  return problem == nullptr ? "" : problem;
}

TEST(CApi, RoundTrip) {
  const TemporaryDirectory dir;
  EXPECT_EQ(Problem(CApiRoundTrip((dir / "1").c_str(), (dir / "2").c_str())), "");
}

TEST(CApi, CallersOfEarlierAndLaterVersionsAreUnderstood) {
  const TemporaryDirectory dir;
  EXPECT_EQ(Problem(CApiVersions((dir / "1").c_str())), "");
}

TEST(CApi, BadInputIsRefusedWithAReason) {
  const TemporaryDirectory dir;
  EXPECT_EQ(Problem(CApiBadInput((dir / "1").c_str())), "");
}

TEST(CApi, MistakesAreCodes) {
  const TemporaryDirectory dir;
  EXPECT_EQ(Problem(CApiMistakes((dir / "1").c_str())), "");
}

}  // namespace
}  // namespace unmoor
