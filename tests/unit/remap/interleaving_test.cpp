// Every interleaving of copier, writers, forker and killer on a small process, driven through the
// real batch state machine: no schedule loses a write, fails a system call or leaves a thread
// waiting. And with any one safeguard taken out, some schedule does.
#include <gtest/gtest.h>

#include "interleaved_carrier.h"
#include "interleaved_machine.h"
#include "remap/remapper.h"

namespace unmoor::interleaving {
namespace {

using Kind = Op::Kind;

// One run of the whole process under the schedule the explorer is at.
std::string RunOnce(const Scenario& scenario, Explorer& explorer) {
  Machine machine(scenario, explorer);
  try {
    for (bool done = false; !done;) {
      InterleavedCarrier carrier(machine);
      Remapper remapper(carrier, Nanos(1'000'000), true);
      try {
        const auto result = remapper.Run([](const RemapCounts&) {});
        if (!result) return result.error().message() + machine.Trace();
        done = true;
      } catch (const Killed&) {
        machine.CopierKilled();
      }
    }
    machine.Unregister();
    machine.RunThreadsToTheEnd();
  } catch (const Machine::Violation& violation) {
    return violation.what;
  }
  for (int page = 0; page < machine.page_count(); ++page) {
    if (machine.page(page).image) return "the image is still mapped" + machine.Trace();
    if (machine.page(page).guarded) return "a guard was left behind" + machine.Trace();
  }
  return {};
}

struct Found {
  std::string violation;
  size_t states = 0;
};

Found Explore(Scenario scenario, Mutation mutation = Mutation::kNone) {
  scenario.mutation = mutation;
  Explorer explorer;
  Found found;
  found.violation = explorer.Explore([&] { return RunOnce(scenario, explorer); });
  found.states = explorer.states();
  ::testing::Test::RecordProperty("states", std::to_string(found.states));
  return found;
}

// Two writers, one of whom also writes by system calls.
Scenario Writers() {
  Scenario scenario;
  scenario.image = {0, 7};
  scenario.threads = {{{Kind::kWrite, 0}, {Kind::kWrite, 1}},
                      {{Kind::kWrite, 1}, {Kind::kCallWrite, 0}}};
  return scenario;
}

Scenario WritersUnderFaultGuard() {
  Scenario scenario;
  scenario.image = {5, 7};
  scenario.fault_guard = true;
  scenario.threads = {{{Kind::kWrite, 0}, {Kind::kWrite, 1}, {Kind::kFork, 0}},
                      {{Kind::kWrite, 1}, {Kind::kWrite, 0}}};
  return scenario;
}

Scenario HandlerThatWrites() {
  Scenario scenario;
  scenario.image = {5, 7};
  scenario.fault_guard = true;
  scenario.threads = {{{Kind::kHandlerWrite, 0}, {Kind::kWrite, 1}, {Kind::kHandlerWrite, 1}},
                      {{Kind::kWrite, 0}}};
  return scenario;
}

Scenario ForkerUnderFaultGuard() {
  Scenario scenario;
  scenario.image = {5, 7};
  scenario.fault_guard = true;
  scenario.threads = {{{Kind::kFork, 0}, {Kind::kWrite, 0}}, {{Kind::kWrite, 1}}};
  return scenario;
}

Scenario WriterThatGivesBack() {
  Scenario scenario;
  scenario.image = {5, 7};
  scenario.threads = {
      {{Kind::kGiveBack, 0}, {Kind::kWrite, 0}, {Kind::kGiveBack, 0}, {Kind::kWrite, 0}},
      {{Kind::kWrite, 1}}};
  return scenario;
}

Scenario PinnedPage() {
  Scenario scenario;
  scenario.image = {5, 7};
  scenario.threads = {{{Kind::kPinnedWrite, 0}, {Kind::kWrite, 1}}};
  return scenario;
}

Scenario ThreadBornMeanwhile() {
  Scenario scenario;
  scenario.image = {5, 7};
  scenario.threads = {{{Kind::kWrite, 0}, {Kind::kSpawn, 0}},
                      {{Kind::kWrite, 1}, {Kind::kWrite, 0}}};
  scenario.last_is_born_late = true;
  return scenario;
}

Scenario WriterForkerKiller() {
  Scenario scenario;
  scenario.image = {5, 7};
  scenario.threads = {{{Kind::kWrite, 0}, {Kind::kWrite, 1}}, {{Kind::kFork, 0}}};
  scenario.killer = true;
  return scenario;
}

// --- right as it is ------------------------------------------------------------------------------

TEST(Interleavings, OfTwoWritersNoneLosesAWrite) {
  const Found found = Explore(Writers());
  EXPECT_EQ(found.violation, "");
  EXPECT_GT(found.states, 1000U);
}

TEST(Interleavings, OfTwoWritersAndAForkerUnderTheFaultGuardNoneLosesAWrite) {
  const Found found = Explore(WritersUnderFaultGuard());
  EXPECT_EQ(found.violation, "");
  EXPECT_GT(found.states, 1000U);
}

TEST(Interleavings, OfHandlersOfTheProgramsNoneMeetsAGuardOrLosesAWrite) {
  const Found found = Explore(HandlerThatWrites());
  EXPECT_EQ(found.violation, "");
  EXPECT_GT(found.states, 1000U);
}

TEST(Interleavings, OfForksNoneCopiesAGuardWithoutItsHandler) {
  EXPECT_EQ(Explore(ForkerUnderFaultGuard()).violation, "");
}

TEST(Interleavings, OfGivingBackAndWritingNoneBringsOldBytesBack) {
  const Found found = Explore(WriterThatGivesBack());
  EXPECT_EQ(found.violation, "");
  EXPECT_GT(found.states, 1000U);
}

TEST(Interleavings, OfATransferIntoAPinnedPageNoneLosesIt) {
  EXPECT_EQ(Explore(PinnedPage()).violation, "");
}

TEST(Interleavings, OfAThreadBornDuringAWindowNoneLosesItsWrites) {
  EXPECT_EQ(Explore(ThreadBornMeanwhile()).violation, "");
}

TEST(Interleavings, OfWriterForkerAndKillerNoneLosesAWriteOrGivesAChildWrongMemory) {
  const Found found = Explore(WriterForkerKiller());
  EXPECT_EQ(found.violation, "");
  EXPECT_GT(found.states, 1000U);
}

TEST(Interleavings, OfWindowsGivenUpForTooManyWritesNoneLosesAWrite) {
  Scenario scenario = Writers();
  scenario.too_dirty = 1;
  EXPECT_EQ(Explore(scenario).violation, "");
}

TEST(Interleavings, OfGivingBackAndAKillerNoneBringsOldBytesBack) {
  Scenario scenario = WriterThatGivesBack();
  scenario.threads.pop_back();
  scenario.killer = true;
  EXPECT_EQ(Explore(scenario).violation, "");
}

// --- and finds what is wrong ---------------------------------------------------------------------

void ExpectFound(const Scenario& scenario, Mutation mutation, const std::string& what) {
  const std::string violation = Explore(scenario, mutation).violation;
  EXPECT_NE(violation.find(what), std::string::npos) << "found: " << violation;
}

TEST(InterleavingsFind, ASwapWithoutRecheck) {
  ExpectFound(Writers(), Mutation::kNoRecheck, "instead of");
  ExpectFound(WritersUnderFaultGuard(), Mutation::kNoRecheck, "instead of");
}

TEST(InterleavingsFind, ARecheckBeforeAllThreadsAreStopped) {
  ExpectFound(Writers(), Mutation::kRecheckBeforeAllStopped, "instead of");
  ExpectFound(WritersUnderFaultGuard(), Mutation::kRecheckBeforeAllStopped, "instead of");
}

TEST(InterleavingsFind, AGuardLiftedBeforeTheSwap) {
  ExpectFound(Writers(), Mutation::kUnguardBeforeSwap, "instead of");
  ExpectFound(WritersUnderFaultGuard(), Mutation::kUnguardBeforeSwap, "instead of");
}

TEST(InterleavingsFind, GivingBackThatNobodyAnswers) {
  ExpectFound(WriterThatGivesBack(), Mutation::kGivingBackNotAnswered, "instead of");
}

TEST(InterleavingsFind, AThreadBornAfterTheListing) {
  ExpectFound(ThreadBornMeanwhile(), Mutation::kThreadsListedOnce, "instead of");
}

TEST(InterleavingsFind, AThreadInsideASystemCallTakenForStopped) {
  ExpectFound(Writers(), Mutation::kThreadsInCallsIgnored, "instead of");
  ExpectFound(PinnedPage(), Mutation::kThreadsInCallsIgnored, "instead of");
}

TEST(InterleavingsFind, ATransferIntoAPagePinnedBeforeTheBaseline) {
  ExpectFound(PinnedPage(), Mutation::kOwnPagesNotCompared, "instead of");
}

TEST(InterleavingsFind, AHandlerThatSleepsWithoutLooking) {
  ExpectFound(Writers(), Mutation::kSleepsWithoutLooking, "waits for ever");
  ExpectFound(WritersUnderFaultGuard(), Mutation::kSleepsWithoutLooking, "waits for ever");
}

TEST(InterleavingsFind, AForkedChildThatKeepsTheGuard) {
  ExpectFound(WritersUnderFaultGuard(), Mutation::kChildKeepsGuard, "child");
}

TEST(InterleavingsFind, AGuardPutUpWhileAHandlerOfTheProgramsRuns) {
  ExpectFound(HandlerThatWrites(), Mutation::kBlockersIgnored, "killed");
}

TEST(InterleavingsFind, AHandlerOfTheProgramsThatBeginsUnderAGuard) {
  ExpectFound(HandlerThatWrites(), Mutation::kHandlersBeginUnderGuard, "killed");
}

TEST(InterleavingsFind, AForkThatBeganBeforeTheHandlerWasInstalled) {
  ExpectFound(ForkerUnderFaultGuard(), Mutation::kForksIgnored, "no handler");
}

TEST(InterleavingsFind, ASystemCallIntoAPageUnderTheFaultGuard) {
  Scenario scenario = WritersUnderFaultGuard();
  scenario.threads = {{{Kind::kCallWrite, 0}}};
  ExpectFound(scenario, Mutation::kNone, "EFAULT");
}

}  // namespace
}  // namespace unmoor::interleaving
