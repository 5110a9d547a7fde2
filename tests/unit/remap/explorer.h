// Depth-first search over every schedule of a small model, each state entered once.
//
// The model is run from its beginning for each schedule: Choose() answers as the schedule under way
// says, and where that ends takes the first alternative; afterwards the last choice that has
// another alternative is taken differently. Visit() ends a run that has come to a state seen
// before, so the work follows the number of states, not of schedules. That is complete as long as a
// state's hash covers everything the rest of the run depends on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

namespace unmoor::interleaving {

class Explorer {
 public:
  struct SeenBefore {};

  // `run` returns what is wrong, empty if nothing. Returns the first violation found.
  template <class Run>
  std::string Explore(Run run) {
    do {
      position_ = 0;
      ++schedules_;
      try {
        std::string violation = run();
        if (!violation.empty()) return violation;
      } catch (const SeenBefore&) {
      }
    } while (Advance());
    return {};
  }

  size_t Choose(size_t alternatives) {
    if (position_ == path_.size()) path_.push_back({0, alternatives});
    return path_[position_++].taken;
  }

  void Visit(uint64_t state) {
    if (position_ == path_.size() && !seen_.insert(state).second) throw SeenBefore{};
  }

  [[nodiscard]] size_t states() const { return seen_.size(); }
  [[nodiscard]] size_t schedules() const { return schedules_; }

 private:
  struct Choice {
    size_t taken;
    size_t alternatives;
  };

  bool Advance() {
    path_.resize(position_);
    while (!path_.empty() && path_.back().taken + 1 == path_.back().alternatives) path_.pop_back();
    if (path_.empty()) return false;
    ++path_.back().taken;
    return true;
  }

  std::vector<Choice> path_;
  size_t position_ = 0;
  size_t schedules_ = 0;
  std::unordered_set<uint64_t> seen_;
};

// FNV-1a, word by word.
class Hash {
 public:
  template <class... T>
  void Mix(T... values) {
    ((state_ = (state_ ^ static_cast<uint64_t>(values)) * 0x100000001b3u, state_ ^= state_ >> 29),
     ...);
  }
  [[nodiscard]] uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0xcbf29ce484222325u;
};

}  // namespace unmoor::interleaving
