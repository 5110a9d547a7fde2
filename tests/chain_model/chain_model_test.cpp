// A simulated process tree lives, is dumped in full and as deltas, its images are flattened and
// deleted at random; every image must show exactly what the tree had when it was dumped.
//
// A history is a list of numbers; operations that make no sense where they come do nothing, so
// rapidcheck can shrink it. RC_PARAMS="seed=7 max_success=70000" looks elsewhere and longer.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "os/file.h"
#include "simulated_tree.h"
#include "store/flatten.h"

namespace unmoor {
namespace {

constexpr uint64_t kPages = 96;  // of address space, so that VMAs meet and replace one another
constexpr uint32_t kMostTasks = 3;

struct Operation {
  uint32_t kind = 0;
  uint32_t a = 0;
  uint32_t b = 0;
  uint32_t c = 0;
};

void showValue(const Operation& op, std::ostream& out) {
  out << "{" << op.kind % 16 << ", " << op.a << ", " << op.b << ", " << op.c << "}";
}

void Demand(const Result<>& result) {
  if (!result) RC_FAIL(result.error().message());
}

class History {
 public:
  explicit History(std::string store) : store_(std::move(store)) {
    tree_[1].Map(0, 24);
    tree_[1].Map(40, 56);
  }
  void Do(const Operation& op);
  void CheckAll() const {
    for (const auto& [directory, tree] : images_) Demand(ExpectShows(directory, tree));
  }

 private:
  SimulatedTask& AnyTask(uint32_t number) {
    return std::next(tree_.begin(), number % static_cast<uint32_t>(tree_.size()))->second;
  }
  [[nodiscard]] std::optional<std::string> AnyImage(uint32_t number) const {
    if (images_.empty()) return std::nullopt;
    return std::next(images_.begin(), number % static_cast<uint32_t>(images_.size()))->first;
  }
  void ChangePages(const Operation& op);
  void Grow(const Operation& op);
  void Fork(const Operation& op);
  void Dump(const Operation& op);
  void FlattenOne(const std::string& directory) const;

  const std::string store_;
  SimulatedTree tree_;
  std::map<std::string, SimulatedTree> images_;  // what each holds
  uint64_t words_ = 0;
  int dumps_ = 0;
};

// Writes, zeroes or gives back a few pages inside some VMA.
void History::ChangePages(const Operation& op) {
  SimulatedTask& task = AnyTask(op.a);
  if (task.vmas.empty()) return;
  const auto& [first, last] =
      *std::next(task.vmas.begin(), op.b % static_cast<uint32_t>(task.vmas.size()));
  const uint64_t begin = first + op.c % (last - first);
  const uint64_t end = std::min(last, begin + 1 + op.c / 97 % 6);
  for (uint64_t page = begin; page < end; ++page) {
    switch (op.kind % 16) {
      case 3:
        task.pages[page] = 0;
        break;
      case 4:
      case 5:
        task.pages.erase(page);
        break;
      default:
        task.pages[page] = ++words_;
    }
  }
}

void History::Grow(const Operation& op) {
  SimulatedTask& task = AnyTask(op.a);
  if (task.vmas.empty()) return;
  const auto vma = std::next(task.vmas.begin(), op.b % static_cast<uint32_t>(task.vmas.size()));
  const auto next = std::next(vma);
  const uint64_t room = (next == task.vmas.end() ? kPages : next->first) - vma->second;
  vma->second += std::min<uint64_t>(room, 1 + op.c % 8);
}

void History::Fork(const Operation& op) {
  if (tree_.size() == kMostTasks) return;
  const auto parent = std::next(tree_.begin(), op.a % static_cast<uint32_t>(tree_.size()));
  uint32_t vpid = parent->first;  // above its parent's; used again once free
  while (tree_.contains(vpid)) ++vpid;
  SimulatedTask child = parent->second;
  child.parent = parent->first;
  tree_[vpid] = std::move(child);
}

void History::Dump(const Operation& op) {
  const bool full = op.kind % 16 == 11;
  const auto over = op.b % 4 == 0 ? AnyImage(op.c) : std::nullopt;  // perhaps the parent itself
  const std::string directory = over ? *over : store_ + "/" + std::to_string(++dumps_);
  Demand(DumpTree(tree_, directory, full ? std::nullopt : AnyImage(op.a)));
  images_[directory] = tree_;
  Demand(ExpectShows(directory, tree_));
}

void History::FlattenOne(const std::string& directory) const {
  const auto report = Flatten({directory, {}, {}});
  if (!report) RC_FAIL(report.error().message());
  const auto chain = MeasureChain(directory);
  RC_ASSERT(chain.has_value() && chain->flat());
  Demand(ExpectShows(directory, images_.at(directory)));
}

void History::Do(const Operation& op) {
  switch (op.kind % 16) {
    case 6: {
      const uint64_t begin = op.b % (kPages - 1);
      return AnyTask(op.a).Map(begin, std::min(kPages, begin + 1 + op.c % 24));
    }
    case 7: {
      const uint64_t begin = op.b % (kPages - 1);
      return AnyTask(op.a).Unmap(begin, std::min(kPages, begin + 1 + op.c % 12));
    }
    case 8:
      return Grow(op);
    case 9:
      return Fork(op);
    case 10: {  // a leaf of the tree ends
      const uint32_t last = tree_.rbegin()->first;
      if (last != 1) tree_.erase(last);
      return;
    }
    case 11:
    case 12:
    case 13:
      return Dump(op);
    case 14:
      if (const auto image = AnyImage(op.a)) FlattenOne(*image);
      return;
    case 15:
      if (const auto image = AnyImage(op.a)) {
        Demand(RemoveTree(*image));
        images_.erase(*image);
      }
      return;
    default:
      return ChangePages(op);
  }
}

// In memory where there is some: a history is many small files.
class Store {
 public:
  Store()
      : path_(MakeTemporaryDirectory(
                  IsTmpfs("/dev/shm").value_or(false) ? "/dev/shm" : ::testing::TempDir(),
                  "unmoor-model-")
                  .value()) {}
  ~Store() { (void)RemoveTree(path_); }
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

RC_GTEST_PROP(ChainModel, EveryImageShowsWhatTheProgramHadWhateverBecameOfTheOthers, ()) {
  const auto number = rc::gen::inRange<uint32_t>(0, 1 << 16);
  const auto operations = *rc::gen::container<std::vector<Operation>>(
      rc::gen::construct<Operation>(number, number, number, number));
  const Store store;
  History history(store.path());
  for (const Operation& op : operations) history.Do(op);
  history.CheckAll();
}

}  // namespace
}  // namespace unmoor

int main(int argc, char** argv) {
  ::setenv("RC_PARAMS", "seed=20261126 max_success=700 max_size=60", 0);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
