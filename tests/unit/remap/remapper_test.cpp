// The batch state machine against a simulated program: whatever the program does, and whenever, it
// sees what it would see with plain anonymous memory.
//
// Two ways: every interleaving of a few actions on two pages, and random histories on more. And a
// proof that the model is worth something: with any one safeguard taken out it finds a violation.
#include "remap/remapper.h"

#include <gtest/gtest.h>

#include <random>

#include "simulated_carrier.h"
#include "simulated_program.h"

namespace unmoor {
namespace {

using simulation::Action;
using simulation::Faults;
using simulation::PageRange;
using simulation::Program;
using simulation::SimulatedCarrier;
using Kind = Action::Kind;

// What one run showed. `steps`: how many times the program could have acted.
struct Outcome {
  std::string violation;
  size_t steps = 0;
  size_t actions_done = 0;
  std::string history;
};

// Runs a remap of `program`; `act` is the program's turn, between any two steps of the carrier.
// Returns what is wrong, if anything.
template <class Act, class Prepare>
std::string RunRemap(Program& program, Faults faults, Act act, Prepare prepare) {
  const auto turn = [&] {
    program.Step();
    act();
    program.Compare();
  };
  SimulatedCarrier carrier(program, faults, turn);
  prepare(carrier);
  Remapper remapper(carrier, Nanos(1'000'000), true);
  const auto result = remapper.Run([](const RemapCounts&) {});
  if (!result) return result.error().message();
  if (!carrier.HandleEvents()) return "cannot handle the last events";
  program.StopThreads();
  program.Compare();
  if (!program.violation().empty()) return program.violation();
  if (program.MapsImage()) return "the image is still mapped";
  return {};
}

// --- every interleaving
// ---------------------------------------------------------------------------

// Two pages on both sides of a block's border, the first a hole in the image.
constexpr uint64_t kLow = 511;
constexpr uint64_t kHigh = 512;

struct Placed {
  Action action;
  size_t at =
      0;  // the program's turn in which it happens, or the first one after that in which it can
};

Outcome RunPlaced(const std::vector<Placed>& script, Faults faults) {
  Program program({0, 0, 7000});
  program.MapImage({kLow, kHigh + 1}, 1);
  Outcome outcome;
  size_t next = 0;
  const auto act = [&] {
    while (next < script.size() && script[next].at <= outcome.steps) {
      const auto done = program.Do(script[next].action);
      if (done == Program::Outcome::kBlocked) break;
      outcome.history +=
          fmt::format("\n  turn {}: {}", outcome.steps, ToString(script[next].action));
      ++next;
    }
    ++outcome.steps;
  };
  outcome.violation = RunRemap(program, faults, act, [](SimulatedCarrier&) {});
  outcome.actions_done = next;
  return outcome;
}

class Exhaustive {
 public:
  explicit Exhaustive(Faults faults = {}) : faults_(faults) {}

  // Every script of `length` of these actions, placed in every way. Stops at the first violation.
  void Run(const std::vector<Action>& alphabet, size_t length) {
    if (script_.size() == length) return Place(0, 0);
    for (const Action& action : alphabet) {
      script_.push_back({action, 0});
      Run(alphabet, length);
      script_.pop_back();
      if (!violation_.empty()) return;
    }
  }
  [[nodiscard]] const std::string& violation() const { return violation_; }
  [[nodiscard]] size_t runs() const { return runs_; }

 private:
  void Place(size_t index, size_t from) {
    const bool last = index + 1 == script_.size();
    for (size_t at = from;; ++at) {
      script_[index].at = at;
      if (last) {
        const Outcome outcome = RunPlaced(script_, faults_);
        ++runs_;
        if (!outcome.violation.empty()) violation_ = outcome.violation + outcome.history;
        if (!violation_.empty() || at >= outcome.steps) return;
      } else {
        Place(index + 1, at);
        if (!violation_.empty() || at >= kMostTurns) return;
      }
    }
  }

  static constexpr size_t kMostTurns = 24;  // a run undisturbed has fewer
  Faults faults_;
  std::vector<Placed> script_;
  std::string violation_;
  size_t runs_ = 0;
};

Action Make(Kind kind, uint64_t begin, uint64_t end, int late = 0, int thread = 0) {
  return {kind, {begin, end}, thread, late, 0};
}

std::vector<Action> AllActions() {
  Action move = Make(Kind::kMove, kLow, kHigh + 1);
  move.to = kHigh + 512;
  return {Make(Kind::kWrite, kLow, kHigh),        Make(Kind::kWrite, kHigh, kHigh + 1),
          Make(Kind::kGiveBack, kLow, kHigh),     Make(Kind::kGiveBack, kLow, kHigh + 1, 2),
          Make(Kind::kUnmap, kLow, kHigh),        Make(Kind::kMapOver, kHigh, kHigh + 1),
          Make(Kind::kProtect, kHigh, kHigh + 1), move};
}

// What takes most care, with threads of their own.
std::vector<Action> WritesAndGivingBack() {
  return {Make(Kind::kWrite, kHigh, kHigh + 1), Make(Kind::kGiveBack, kHigh, kHigh + 1, 0),
          Make(Kind::kGiveBack, kHigh, kHigh + 1, 5), Make(Kind::kWrite, kLow, kHigh, 0, 1)};
}

TEST(RemapperExhaustive, AnUndisturbedRemapKeepsTheMemory) {
  const Outcome outcome = RunPlaced({}, {});
  EXPECT_EQ(outcome.violation, "");
  EXPECT_LT(outcome.steps, 24U);
}

TEST(RemapperExhaustive, TwoActionsAnywhereLeaveTheProgramsViewRight) {
  Exhaustive exhaustive;
  exhaustive.Run(AllActions(), 2);
  EXPECT_EQ(exhaustive.violation(), "");
  RecordProperty("runs", static_cast<int>(exhaustive.runs()));
}

TEST(RemapperExhaustive, ThreeWritesAndGivingsBackAnywhereLeaveTheProgramsViewRight) {
  Exhaustive exhaustive;
  exhaustive.Run(WritesAndGivingBack(), 3);
  EXPECT_EQ(exhaustive.violation(), "");
  RecordProperty("runs", static_cast<int>(exhaustive.runs()));
}

// --- random histories
// -----------------------------------------------------------------------------

class RandomHistory {
 public:
  RandomHistory(uint32_t seed, Faults faults)
      : random_(seed), faults_(faults), program_(MakeImage()) {
    // Over a block's border; of two blocks; a single page at an unlike offset.
    program_.MapImage({kAreas[0].begin, kAreas[0].end}, 3);
    program_.MapImage({kAreas[1].begin, kAreas[1].end}, 20);
    program_.MapImage({kAreas[2].begin, kAreas[2].end}, 0);
  }

  Outcome Run() {
    Outcome outcome;
    const auto act = [&] {
      ++outcome.steps;
      if (left_ == 0 || random_() % 3 != 0) return;
      const Action action = RandomAction();
      if (program_.Do(action) != Program::Outcome::kDone) return;
      --left_;
      ++outcome.actions_done;
      outcome.history += fmt::format("\n  turn {}: {}", outcome.steps, ToString(action));
    };
    outcome.violation = RunRemap(program_, faults_, act, [&](SimulatedCarrier& carrier) {
      carrier.refuses_to_stop = [&] { return random_() % 4 == 0; };
      carrier.too_dirty = [&] { return random_() % 6 == 0; };
    });
    return outcome;
  }

 private:
  static constexpr PageRange kAreas[] = {{509, 516}, {2046, 2052}, {5000, 5001}};
  static constexpr uint64_t kFree = 9000;  // where moves go

  std::vector<uint64_t> MakeImage() {
    std::vector<uint64_t> image(40);
    for (size_t i = 0; i < image.size(); ++i) image[i] = random_() % 3 == 0 ? 0 : 5000 + i;
    return image;
  }

  PageRange RandomRange() {
    const size_t choice = random_() % 4;
    PageRange area = choice < 3 ? kAreas[choice] : PageRange{kFree, kFree + 8};
    const uint64_t begin = area.begin + random_() % (area.end - area.begin);
    const uint64_t length = 1 + random_() % std::min<uint64_t>(area.end - begin, 4);
    return {begin, begin + length};
  }

  Action RandomAction() {
    constexpr Kind kKinds[] = {Kind::kWrite,    Kind::kWrite,    Kind::kWrite,    Kind::kWrite,
                               Kind::kGiveBack, Kind::kGiveBack, Kind::kGiveBack, Kind::kUnmap,
                               Kind::kMapOver,  Kind::kProtect,  Kind::kMove};
    Action action;
    action.kind = kKinds[random_() % std::size(kKinds)];
    action.pages = RandomRange();
    action.thread = static_cast<int>(random_() % 3);
    action.late = static_cast<int>(random_() % 4);
    action.to =
        random_() % 3 == 0 ? kAreas[random_() % 2].begin + random_() % 4 : kFree + random_() % 4;
    return action;
  }

  std::mt19937 random_;
  Faults faults_;
  Program program_;
  size_t left_ = 40;
};

constexpr uint32_t kHistories = 4000;

// The first seed that shows a violation, with its history; empty when none does.
std::string FindViolation(Faults faults, uint32_t histories = kHistories) {
  for (uint32_t seed = 1; seed <= histories; ++seed) {
    const Outcome outcome = RandomHistory(seed, faults).Run();
    if (!outcome.violation.empty()) {
      return fmt::format("seed {}: {}{}", seed, outcome.violation, outcome.history);
    }
  }
  return {};
}

TEST(RemapperRandom, WhateverTheProgramDoesItsViewStaysRight) {
  EXPECT_EQ(FindViolation({}), "");
}

TEST(RemapperRandom, TheHistoriesDoSomething) {
  size_t actions = 0;
  for (uint32_t seed = 1; seed <= 20; ++seed) actions += RandomHistory(seed, {}).Run().actions_done;
  EXPECT_GT(actions, 20U * 8);
}

TEST(RemapperPlans, WhatAPlanNamesTwiceIsSwappedOnce) {
  Program program({0, 0, 7000});
  program.MapImage({kLow, kHigh + 1}, 1);
  const auto twice = [](SimulatedCarrier& carrier) { carrier.plans_with_areas_twice = 2; };
  EXPECT_EQ(RunRemap(program, {}, [] {}, twice), "");
}

// The most that one window frees of areas of so many pages each, with pages of which the program
// wrote the first `written`.
uint64_t MostFreed(const std::vector<uint64_t>& areas, uint64_t written) {
  Program program(std::vector<uint64_t>(areas.front(), 7000));
  uint64_t begin = kHigh;
  for (const uint64_t pages : areas) {
    program.MapImage({begin, begin + pages}, 0);
    for (uint64_t page = begin; page < begin + std::min(pages, written); ++page) {
      EXPECT_EQ(program.Do(Make(Kind::kWrite, page, page + 1)), Program::Outcome::kDone);
    }
    begin += pages + 512;
  }
  uint64_t most = 0;
  EXPECT_EQ(RunRemap(
                program, {}, [] {},
                [&](SimulatedCarrier& carrier) {
                  carrier.swapped = [&](uint64_t own) { most = std::max(most, own); };
                }),
            "");
  return most;
}

// RunRemap asks for a millisecond.
TEST(RemapperPace, AWindowFreesNoMoreThanThePauseAllows) {
  constexpr uint64_t kMost = 1'000'000 / 1200;
  constexpr uint64_t kLarge = 64 * 256 + 512;  // above 64 MiB: may be cut
  EXPECT_LE(MostFreed({kLarge}, 2048), kMost);
  EXPECT_LE(MostFreed({512, 512, 512}, 512), kMost);
}

// mremap of all of it would fail meanwhile.
TEST(RemapperPace, ASmallAreaIsNotCutForThat) {
  EXPECT_EQ(MostFreed({2048}, 2048), 2048U);
  EXPECT_EQ(MostFreed({1024, 1024}, 1024), 1024U);
}

// --- the model finds what it should
// ---------------------------------------------------------------

TEST(RemapperModel, FindsASwapWithoutRecheck) {
  const Faults faults{.no_recheck = true};
  EXPECT_NE(FindViolation(faults), "");
  Exhaustive exhaustive(faults);
  exhaustive.Run(AllActions(), 1);
  EXPECT_NE(exhaustive.violation(), "");
}

TEST(RemapperModel, FindsAProgramThatRunsBetweenRecheckAndSwap) {
  const Faults faults{.no_guard = true};
  EXPECT_NE(FindViolation(faults), "");
  Exhaustive exhaustive(faults);
  exhaustive.Run(AllActions(), 1);
  EXPECT_NE(exhaustive.violation(), "");
}

TEST(RemapperModel, FindsASwapByAnOldPlan) {
  const Faults faults{.no_checks = true};
  EXPECT_NE(FindViolation(faults), "");
  Exhaustive exhaustive(faults);
  exhaustive.Run(AllActions(), 1);
  EXPECT_NE(exhaustive.violation(), "");
}

TEST(RemapperModel, FindsCopiesThatOutliveGivingBack) {
  const Faults faults{.keep_copies = true};
  EXPECT_NE(FindViolation(faults), "");
  Exhaustive exhaustive(faults);
  exhaustive.Run(AllActions(), 1);
  EXPECT_NE(exhaustive.violation(), "");
}

TEST(RemapperModel, FindsAnEventReadBeforeTheMemoryIsDropped) {
  const Faults faults{.drop_late = true};
  EXPECT_NE(FindViolation(faults), "");
  Exhaustive exhaustive(faults);
  exhaustive.Run(AllActions(), 1);
  EXPECT_NE(exhaustive.violation(), "");
}

TEST(RemapperModel, FindsMemoryGivenBackAgainThatIsCopiedBeforeItIsEmptied) {
  const Faults faults{.never_stopped = true};
  EXPECT_NE(FindViolation(faults), "");
  Exhaustive exhaustive(faults);
  exhaustive.Run(WritesAndGivingBack(), 3);
  EXPECT_NE(exhaustive.violation(), "");
}

}  // namespace
}  // namespace unmoor
