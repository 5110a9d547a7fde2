// Whatever fails while an image is published or flattened, the old or the new one is there, whole.
//
// Three ways of failing: each system call on files in turn returns an error; the machine loses
// power before each of them, and what no fsync has made durable is gone; the command is killed at
// each fault point. What is on disk afterwards is read as a restore would read it.
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <set>
#include <thread>

#include "image/verify.h"
#include "image_fixture.h"
#include "os/file_hook.h"
#include "simulated_tree.h"
#include "store/catalog.h"
#include "store/flatten.h"

namespace unmoor {
namespace {

#ifdef UNMOOR_FAULT_POINTS

// In memory where there is some: each case makes many small files and fsyncs them.
const int kInMemory =
    IsTmpfs("/dev/shm").value_or(false) ? ::setenv("TEST_TMPDIR", "/dev/shm", 0) : 0;

// An image with a chain behind it in a directory of its own.
class Chain {
 public:
  Chain() {
    tree_[1].Map(0, 40);
    for (uint64_t page = 0; page < 36; ++page) tree_[1].pages[page] = page + 1;
    tree_[2] = tree_[1];
    tree_[2].parent = 1;
    const std::string first = parents_.path() + "/first";
    EXPECT_TRUE(DumpTree(tree_, first, std::nullopt, true));
    tree_[1].pages[3] = 300;
    tree_[2].pages.erase(5);
    EXPECT_TRUE(DumpTree(tree_, image(), first, true));
    next_ = tree_;
    next_[1].pages[9] = 900;
  }
  [[nodiscard]] const std::string& store() const { return store_.path(); }
  [[nodiscard]] std::string image() const { return store_.path() + "/image"; }
  [[nodiscard]] const SimulatedTree& tree() const { return tree_; }
  // The tree a generation later.
  [[nodiscard]] const SimulatedTree& next() const { return next_; }

 private:
  const TemporaryDirectory parents_;
  const TemporaryDirectory store_;
  SimulatedTree tree_;
  SimulatedTree next_;
};

// What is done to it: each makes `image` anew.
struct Command {
  const char* name;
  Result<> (*run)(const Chain&);
  bool changes;  // it holds next() afterwards, not tree()
};
const Command kCommands[] = {
    {"flatten",
     [](const Chain& chain) {
       return Flatten({chain.image(), {}, {}}).map([](const FlattenReport&) {});
     },
     false},
    {"dump over its own parent",
     [](const Chain& chain) { return DumpTree(chain.next(), chain.image(), chain.image(), true); },
     true},
};

// Whether `image` is sound and holds what it held before, or what it should hold afterwards.
bool IsOld(const Chain& chain, const std::string& image) {
  return ExpectShows(image, chain.tree()).has_value();
}
bool IsNew(const Chain& chain, const Command& command, const std::string& image) {
  return ExpectShows(image, command.changes ? chain.next() : chain.tree()).has_value();
}
std::vector<std::string> DamagesOf(const std::string& image) {
  std::vector<std::string> damages;
  const auto manifest = ReadManifest(image);
  if (!manifest) return {manifest.error().message()};
  for (const ManifestLayer& layer : manifest->layers) {
    for (const Damage& damage : VerifyLayer(image, layer.id, &layer, {}).damages) {
      damages.push_back(damage.what);
    }
  }
  return damages;
}

std::vector<std::string> NamesIn(const std::string& directory) {
  return ListDirectory(directory).value();
}

class Hooked {
 public:
  explicit Hooked(FileHook hook) { SetFileHook(std::move(hook)); }
  ~Hooked() { SetFileHook({}); }
  Hooked(const Hooked&) = delete;
  Hooked& operator=(const Hooked&) = delete;
};

// --- Errors
// ----------------------------------------------------------------------------------------

TEST(Crash, AnErrorOfAnySystemCallIsToldAndNothingIsLost) {
  for (const Command& command : kCommands) {
    const std::vector<int> all = {ENOSPC, EIO, EMFILE, ENOMEM};
    // All four for the one, in rotation for the other: what is done about them is the same.
    for (size_t round = 0; round < (command.changes ? 1 : all.size()); ++round) {
      int failures = 0;
      for (int nth = 0;; ++nth) {
        const int errnum = all[(round + static_cast<size_t>(nth)) % all.size()];
        const Chain chain;
        std::atomic<int> calls = 0;
        std::string failed;
        Result<> result;
        {
          const Hooked hooked([&](const FileCall& call) {
            if (calls++ != nth) return 0;
            failed = std::string(call.name) + " " + call.path;
            return errnum;
          });
          result = command.run(chain);
        }
        const std::string what = fmt::format("{}: {} fails with {}", command.name, failed, errnum);
        if (calls <= nth) {  // all have had their turn
          ASSERT_OK(result);
          ASSERT_GT(nth, 50) << command.name;
          break;
        }
        ASSERT_TRUE(IsOld(chain, chain.image()) || IsNew(chain, command, chain.image())) << what;
        ASSERT_TRUE(DamagesOf(chain.image()).empty()) << what;
        if (!result) {
          ++failures;
          ASSERT_FALSE(result.error().message().empty()) << what;
        } else {
          ASSERT_TRUE(IsNew(chain, command, chain.image())) << what;
        }
        // Nothing is in the way of the next one, and it leaves nothing.
        ASSERT_OK(command.run(chain));
        ASSERT_OK(CollectGarbage(chain.store(), false));
        ASSERT_EQ(ListDirectory(chain.store())->size(), 1u) << what;
      }
      EXPECT_GT(failures, 30) << command.name;  // most calls matter
    }
  }
}

// --- Loss of power
// -----------------------------------------------------------------------------------

// Knows what is durable below a directory: files and directories as they were when last fsynced.
// What was there from the beginning is durable.
class Disk {
 public:
  explicit Disk(std::string root) : root_(std::move(root)) { Remember(root_, true); }

  void Synced(int fd) {
    const std::string path = fmt::format("/proc/self/fd/{}", fd);
    struct stat info {};
    if (::fstat(fd, &info) == 0) Keep(path, info);
  }
  // What a machine would find after a loss of power now. Names that no fsync of their directory has
  // made durable may be lost or not: with `names` all of them made it, otherwise none.
  void Rebuild(const std::string& to, bool names) const { Rebuild(root_, to, names); }

 private:
  using Key = std::pair<dev_t, ino_t>;

  void Remember(const std::string& path, bool recursive) {
    struct stat info {};
    if (::lstat(path.c_str(), &info) != 0) return;
    Keep(path, info);
    if (!recursive || !S_ISDIR(info.st_mode)) return;
    for (const std::string& name : NamesIn(path)) Remember(path + "/" + name, true);
  }
  void Keep(const std::string& path, const struct stat& info) {
    const Key key{info.st_dev, info.st_ino};
    // Held open, so that the number stays its.
    if (!held_.contains(key)) held_[key] = OpenFile(path, O_RDONLY).value();
    if (S_ISDIR(info.st_mode)) {
      std::map<std::string, Key> entries;
      for (const std::string& name : NamesIn(path)) {
        struct stat entry {};
        if (::lstat((path + "/" + name).c_str(), &entry) == 0) {
          entries[name] = {entry.st_dev, entry.st_ino};
          is_directory_[entries[name]] = S_ISDIR(entry.st_mode);
        }
      }
      directories_[key] = std::move(entries);
    } else {
      const std::string copy = fmt::format("{}/{}", copies_.path(), next_++);
      ASSERT_OK(CopyFile(path, copy));
      files_[key] = copy;
    }
    is_directory_[key] = S_ISDIR(info.st_mode);
  }
  void Rebuild(const std::string& from, const std::string& to, bool names) const {
    struct stat info {};
    ASSERT_EQ(::lstat(from.c_str(), &info), 0);
    RebuildEntry({info.st_dev, info.st_ino}, from, to, names);
  }
  void RebuildEntry(Key key, const std::string& from, const std::string& to, bool names) const {
    if (!is_directory_.at(key)) {
      const auto file = files_.find(key);
      if (file != files_.end()) {
        ASSERT_OK(CopyFile(file->second, to));
      } else {
        ASSERT_OK(WriteFile(to, ""));  // its data never got there
      }
      return;
    }
    ASSERT_OK(MakeDirectory(to));
    std::map<std::string, Key> entries;
    if (names) {
      for (const std::string& name : NamesIn(from)) {
        struct stat info {};
        if (::lstat((from + "/" + name).c_str(), &info) != 0) continue;
        entries[name] = {info.st_dev, info.st_ino};
        is_directory_[entries[name]] = S_ISDIR(info.st_mode);
      }
    } else if (const auto durable = directories_.find(key); durable != directories_.end()) {
      entries = durable->second;
    }
    for (const auto& [name, entry] : entries) {
      RebuildEntry(entry, from + "/" + name, to + "/" + name, names);
    }
  }

  const std::string root_;
  const TemporaryDirectory copies_;
  int next_ = 0;
  std::map<Key, Fd> held_;
  std::map<Key, std::map<std::string, Key>> directories_;
  std::map<Key, std::string> files_;
  mutable std::map<Key, bool> is_directory_;
};

TEST(Crash, ALossOfPowerLeavesTheOldOrTheNewImage) {
  for (const Command& command : kCommands) {
    const Chain chain;
    const size_t layers_before = ReadManifest(chain.image())->layers.size();
    Disk disk(chain.store());
    int crashes = 0;
    const auto crash = [&](const std::string& when, bool finished) {
      for (const bool names : {false, true}) {
        const TemporaryDirectory place;
        const std::string found = place.path() + "/store";
        disk.Rebuild(found, names);
        const std::string image = found + "/image";
        const std::string what = fmt::format("{}: power lost {}, {} names kept", command.name, when,
                                             names ? "all" : "durable");
        ++crashes;
        ASSERT_TRUE(IsOld(chain, image) || IsNew(chain, command, image)) << what;
        const std::vector<std::string> damages = DamagesOf(image);
        ASSERT_TRUE(damages.empty()) << what << ": " << damages.front();
        if (!finished) continue;
        // What was reported done is done.
        ASSERT_TRUE(IsNew(chain, command, image)) << what;
        ASSERT_EQ(ReadManifest(image)->layers.size() == 1, !command.changes) << what;
      }
    };
    Result<> result;
    {
      const std::set<std::string> changing = {"fsync", "rename", "exchange", "unlink",
                                              "mkdir", "link",   "mkdtemp",  "ftruncate"};
      // The layer's writer thread only writes pages; verification has threads of its own.
      const std::thread::id ours = std::this_thread::get_id();
      bool inside = false;
      const Hooked hooked([&](const FileCall& call) {
        if (std::this_thread::get_id() != ours || inside || !changing.contains(call.name)) return 0;
        inside = true;
        if (std::string(call.name) != "fsync") {
          crash(fmt::format("before {} {}", call.name, call.path), false);
        } else {
          disk.Synced(call.fd);
        }
        inside = false;
        return 0;
      });
      result = command.run(chain);
    }
    ASSERT_OK(result);
    crash("after it was done", true);
    EXPECT_GT(layers_before, 1u);
    EXPECT_GT(crashes, 10);
  }
}

// --- Kill
// ------------------------------------------------------------------------------------------

TEST(Crash, DISABLED_ChildFlattens) {
  (void)Flatten({std::string(std::getenv("UNMOOR_TEST_DIR")) + "/image", {}, {}});
}

TEST(Crash, KilledAtAnyPointOfAFlattenTheImageIsThereAndTheNextCommandTidiesUp) {
  for (const char* point :
       {"layer.write", "layer.before_sync", "flatten.pages_written", "flatten.before_publish",
        "publish.before_sync", "publish.before_rename", "publish.after_rename"}) {
    for (const bool collect : {false, true}) {
      const Chain chain;
      const int status = RunHiddenTest("Crash.DISABLED_ChildFlattens", std::string(point) + ":kill",
                                       chain.store());
      ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << point;
      ASSERT_TRUE(IsOld(chain, chain.image())) << point;
      ASSERT_TRUE(DamagesOf(chain.image()).empty()) << point;
      if (collect) {
        ASSERT_OK(CollectGarbage(chain.store(), false));
      } else {
        ASSERT_OK(Flatten({chain.image(), {}, {}}));
      }
      EXPECT_EQ(ListDirectory(chain.store()).value(), std::vector<std::string>{"image"}) << point;
      ASSERT_TRUE(IsOld(chain, chain.image())) << point;
    }
  }
}

#endif  // UNMOOR_FAULT_POINTS

}  // namespace
}  // namespace unmoor
