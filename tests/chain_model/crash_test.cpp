// Whatever fails while a command makes, changes or removes an image, the old or the new one is
// there, whole.
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

#include "image/pack.h"
#include "image/packed_layer.h"
#include "image/verify.h"
#include "image/working_set.h"
#include "image_fixture.h"
#include "os/file_hook.h"
#include "simulated_tree.h"
#include "store/catalog.h"
#include "store/export.h"
#include "store/flatten.h"
#include "store/import.h"
#include "store/reorder.h"
#include "store/verify.h"

namespace unmoor {
namespace {

#ifdef UNMOOR_FAULT_POINTS

// In memory where there is some: each case makes many small files and fsyncs them.
const int kInMemory =
    IsTmpfs("/dev/shm").value_or(false) ? ::setenv("TEST_TMPDIR", "/dev/shm", 0) : 0;

std::vector<std::string> NamesIn(const std::string& directory) {
  return ListDirectory(directory).value_or(std::vector<std::string>());
}

Result<> CopyTree(const std::string& from, const std::string& to) {
  UNMOOR_TRY(MakeDirectory(to));
  for (const std::string& name : NamesIn(from)) {
    const bool directory = ListDirectory(from + "/" + name).has_value();
    UNMOOR_TRY((directory ? CopyTree : CopyFile)(from + "/" + name, to + "/" + name));
  }
  return {};
}

// Overwrites some bytes in the middle of what the file holds.
Result<> Spoil(const std::string& path) {
  UNMOOR_ASSIGN(const Fd fd, OpenFile(path, O_RDWR));
  UNMOOR_ASSIGN(const struct stat info, StatFd(fd.get(), path));
  UNMOOR_ASSIGN(
      const auto data,
      DataRanges(fd.get(), {FileOffset(0), FileOffset(static_cast<uint64_t>(info.st_size))}, path));
  const FileOffset at = data.front().begin + Bytes(data.front().size().value / 2);
  return WriteExactlyAt(fd.get(), std::vector<std::byte>(16, std::byte{0x55}), at, path);
}

// An image with a chain behind it, and what else a command may need, in directories of their own.
class Chain {
 public:
  Chain() {
    tree_[1].Map(0, 40);
    for (uint64_t page = 0; page < 36; ++page) tree_[1].pages[page] = page + 1;
    tree_[2] = tree_[1];
    tree_[2].parent = 1;
    const std::string first = beside("first");
    EXPECT_TRUE(DumpTree(tree_, first, std::nullopt, true));
    tree_[1].pages[3] = 300;
    tree_[2].pages.erase(5);
    EXPECT_TRUE(DumpTree(tree_, image(), first, true));
    EXPECT_TRUE(DumpStock(tree_, image() + "/criu", false));
    next_ = tree_;
    next_[1].pages[9] = 900;
  }
  [[nodiscard]] const std::string& store() const {
    return looked_at_.empty() ? store_.path() : looked_at_;
  }
  [[nodiscard]] std::string image() const { return store() + "/image"; }
  [[nodiscard]] std::string out() const { return store() + "/out"; }
  // From now on another store is looked at; "": its own.
  void LookAt(const std::string& store) { looked_at_ = store; }
  // Outside the store.
  [[nodiscard]] std::string beside(const std::string& name) const {
    return beside_.path() + "/" + name;
  }
  [[nodiscard]] const SimulatedTree& tree() const { return tree_; }
  // The tree a generation later.
  [[nodiscard]] const SimulatedTree& next() const { return next_; }

 private:
  const TemporaryDirectory beside_;
  const TemporaryDirectory store_;
  std::string looked_at_;
  SimulatedTree tree_;
  SimulatedTree next_;
};

// Of the layers; of a packed one also of what its frames hold.
std::vector<std::string> DamagesOf(const std::string& image) {
  std::vector<std::string> damages;
  const auto manifest = ReadManifest(image);
  if (!manifest) return {manifest.error().message()};
  for (const ManifestLayer& layer : manifest->layers) {
    const LayerVerdict verdict = IsPackedLayer(image, layer.id)
                                     ? VerifyPackedLayer(image, layer.id, &layer, true, {})
                                     : VerifyLayer(image, layer.id, &layer, {});
    for (const Damage& damage : verdict.damages) damages.push_back(damage.what);
  }
  return damages;
}

// Whether the image, packed or not, is sound and a restore would show just this tree.
bool Shows(const std::string& image, const SimulatedTree& tree) {
  const auto manifest = ReadManifest(image);
  if (!manifest || !DamagesOf(image).empty()) return false;
  if (NamesIn(CriuDirectory(image)).empty()) return false;
  if (!IsPacked(image, *manifest)) return ExpectShows(image, tree).has_value();
  const TemporaryDirectory place;
  const std::string plain = place.path() + "/plain";
  return UnpackDirectory(image, plain, {}) && ExpectShows(plain, tree);
}

bool ShowsTree(const Chain& chain) {
  return Shows(chain.image(), chain.tree());
}
bool IsPackedNow(const Chain& chain) {
  const auto manifest = ReadManifest(chain.image());
  return manifest && IsPacked(chain.image(), *manifest);
}

// What is done. Each test calls `prepare` first; `whole` must hold at any moment from then on, and
// `done` once the command said so.
struct Command {
  const char* name;
  Result<> (*run)(const Chain&);
  bool (*whole)(const Chain&);
  bool (*done)(const Chain&);
  Result<> (*prepare)(const Chain&);
  std::vector<std::string> left;  // what the store holds afterwards
  // Whether it is still done after a loss of power. What was unpacked for a restore is good until
  // the machine starts anew, and its name says so; what is removed may be there once more.
  bool durable = true;
};

Result<> Nothing(const Chain&) {
  return {};
}
template <class Report>
Result<> Forget(const Result<Report>& report) {
  return report ? Result<>() : Failure(report.error());
}
Result<> PackImage(const Chain& chain) {
  return Forget(PackDirectory(chain.image(), {}, {}, {}));
}

Result<> RepairImage(const Chain& chain) {
  VerifyDirectoryOptions options;
  options.directory = chain.image();
  options.deep = true;
  options.repair_from = chain.beside("copy");
  UNMOOR_ASSIGN(const VerifyDirectoryReport report, VerifyDirectory(options));
  if (!report.sound()) return UserError("{}", report.damages.front().what);
  return {};
}
// Its first layer damaged, a whole image in "copy", one as damaged in "damaged".
Result<> DamageImage(const Chain& chain,
                     std::string (*file)(const std::string&, const std::string&)) {
  UNMOOR_TRY(CopyTree(chain.image(), chain.beside("copy")));
  const std::string id = ReadManifest(chain.image())->layers.front().id;
  UNMOOR_TRY(Spoil(file(chain.image(), id)));
  return CopyTree(chain.image(), chain.beside("damaged"));
}
// Mended, or damaged just as it was.
bool IsNoWorse(const Chain& chain) {
  std::vector<std::string> damages = DamagesOf(chain.beside("damaged"));
  for (std::string& damage : damages) {
    damage.replace(damage.find(chain.beside("damaged")), chain.beside("damaged").size(),
                   chain.image());
  }
  const std::vector<std::string> now = DamagesOf(chain.image());
  return now.empty() || now == damages;
}

bool IsSound(const Chain& chain) {
  return DamagesOf(chain.image()).empty();
}

// What killed commands left, of each kind.
Result<> Litter(const Chain& chain) {
  const std::string layers = LayersDirectory(chain.image());
  UNMOOR_ASSIGN(const std::string id, NewId());
  UNMOOR_TRY(WriteFile(layers + "/" + id + ".pages", "nobody's"));
  UNMOOR_TRY(WriteFile(layers + "/" + id + ".pages.repair-0123ab", "half"));
  UNMOOR_TRY(WriteFile(layers + "/" + id + ".pages.reorder-0123ab", "half"));
  UNMOOR_TRY(MakeDirectory(chain.image() + ".partial-0123ab"));
  UNMOOR_TRY(CopyTree(layers, LayersDirectory(chain.image() + ".partial-0123ab")));
  return CopyTree(chain.image(), chain.store() + "/.image.unpacked-01234567");
}
bool IsTidy(const Chain& chain) {
  return NamesIn(chain.store()) == std::vector<std::string>{"image"} &&
         NamesIn(LayersDirectory(chain.image())).size() ==
             2 * ReadManifest(chain.image())->layers.size();
}

std::string CacheIn(const Chain& chain) {
  const std::vector<std::string> caches = CachesOf(chain.image());
  return caches.empty() ? "" : caches.front();
}

// A plain CRIU directory, held against the tree by importing it.
bool IsStockOfTree(const std::string& directory, const SimulatedTree& tree) {
  const TemporaryDirectory place;
  const std::string image = place.path() + "/image";
  return Import({directory, image, "test", {}}) && Shows(image, tree);
}

// Recorded is the second half of each segment before the first, so that the order is another than
// the file's; and each layer has a second name, as in a chain.
Result<> RecordAndLink(const Chain& chain) {
  UNMOOR_ASSIGN(const Manifest manifest, ReadManifest(chain.image()));
  UNMOOR_TRY(MakeDirectory(chain.beside("linked")));
  WorkingSet set;
  for (const ManifestLayer& entry : manifest.layers) {
    UNMOOR_ASSIGN(const LayerReader layer, LayerReader::Open(chain.image(), entry));
    const auto number = static_cast<uint32_t>(set.layers.size());
    set.layers.push_back(entry.id);
    for (const Segment& segment : layer.segments()) {
      const FileRange all = segment.file_range();
      const FileOffset middle(AlignUp(all.begin.value + all.size().value / 2, kPageSize));
      if (middle < all.end) set.ranges.push_back({number, {middle, all.end}});
      set.ranges.push_back({number, {all.begin, middle}});
    }
    UNMOOR_TRY(HardLink(layer.pages_path(), chain.beside("linked/" + entry.id)));
  }
  return WriteWorkingSet(chain.image(), manifest.checkpoint_id, set);
}
// Every layer is a file of its own now.
bool IsReordered(const Chain& chain) {
  const auto manifest = ReadManifest(chain.image());
  return manifest && std::ranges::all_of(manifest->layers, [&](const ManifestLayer& layer) {
           const auto info = Stat(LayerPagesPath(chain.image(), layer.id));
           return info && info->st_nlink == 1;
         });
}

const std::vector<std::string> kOnlyImage = {"image"};
const Command kFlatten{"flatten",
                       [](const Chain& chain) { return Forget(Flatten({chain.image(), {}, {}})); },
                       ShowsTree,
                       [](const Chain& chain) {
                         const auto manifest = ReadManifest(chain.image());
                         return manifest && manifest->layers.size() == 1;
                       },
                       Nothing,
                       kOnlyImage};
const Command kDump{
    "dump over its own parent",
    [](const Chain& chain) { return DumpTree(chain.next(), chain.image(), chain.image(), true); },
    [](const Chain& chain) { return ShowsTree(chain) || Shows(chain.image(), chain.next()); },
    [](const Chain& chain) { return Shows(chain.image(), chain.next()); },
    Nothing,
    kOnlyImage};
const std::vector<Command> kCommands = {
    kFlatten,
    kDump,
    {"pack", PackImage, ShowsTree, IsPackedNow, Nothing, kOnlyImage},
    {"unpack", [](const Chain& chain) { return Forget(UnpackDirectory(chain.image(), {}, {})); },
     ShowsTree, [](const Chain& chain) { return !IsPackedNow(chain); }, PackImage, kOnlyImage},
    {"unpack for a restore",
     [](const Chain& chain) { return Forget(UnpackForRestore(chain.image(), {})); },
     [](const Chain& chain) {
       return ShowsTree(chain) && (CacheIn(chain).empty() || Shows(CacheIn(chain), chain.tree()));
     },
     [](const Chain& chain) { return !CacheIn(chain).empty(); }, PackImage, kOnlyImage, false},
    {"rm",
     [](const Chain& chain) { return Forget(RemoveImage(chain.image())); },
     [](const Chain& chain) { return !Exists(chain.image()) || ShowsTree(chain); },
     [](const Chain& chain) { return !Exists(chain.image()); },
     Litter,
     {}},
    {"gc", [](const Chain& chain) { return Forget(CollectGarbage(chain.store(), false)); },
     ShowsTree, IsTidy, Litter, kOnlyImage, false},
    {"repair of pages", RepairImage, IsNoWorse, IsSound,
     [](const Chain& chain) { return DamageImage(chain, LayerPagesPath); }, kOnlyImage},
    {"repair of an index", RepairImage, IsNoWorse, IsSound,
     [](const Chain& chain) { return DamageImage(chain, LayerIndexPath); }, kOnlyImage},
    {"repair of a packed layer", RepairImage, IsNoWorse, IsSound,
     [](const Chain& chain) -> Result<> {
       UNMOOR_TRY(PackImage(chain));
       return DamageImage(chain, LayerPackedPath);
     },
     kOnlyImage},
    {"reorder", [](const Chain& chain) { return Forget(Reorder({chain.image(), false, {}})); },
     ShowsTree, IsReordered, RecordAndLink, kOnlyImage},
    {"import",
     [](const Chain& chain) {
       return Forget(Import({chain.beside("stock"), chain.out(), "test", {}}));
     },
     [](const Chain& chain) { return !Exists(chain.out()) || Shows(chain.out(), chain.tree()); },
     [](const Chain& chain) { return Exists(chain.out()); },
     [](const Chain& chain) -> Result<> {
       UNMOOR_TRY(MakeDirectory(chain.beside("stock")));
       return DumpStock(chain.tree(), chain.beside("stock"), true);
     },
     {"image", "out"}},
    {"export",
     [](const Chain& chain) { return Forget(Export({chain.image(), chain.out(), {}})); },
     [](const Chain& chain) {
       return ShowsTree(chain) &&
              (!Exists(chain.out()) || IsStockOfTree(chain.out(), chain.tree()));
     },
     [](const Chain& chain) { return Exists(chain.out()); },
     Nothing,
     {"image", "out"}},
};

class Hooked {
 public:
  explicit Hooked(FileHook hook) { SetFileHook(std::move(hook)); }
  ~Hooked() { SetFileHook({}); }
  Hooked(const Hooked&) = delete;
  Hooked& operator=(const Hooked&) = delete;
};

// --- Errors
// ----------------------------------------------------------------------------------------

// The nth call on files fails; `failed` is its name. False: there were not so many.
bool FailNth(const Command& command, int nth, int errnum, std::string& failed, int& failures) {
  const Chain chain;
  EXPECT_TRUE(command.prepare(chain)) << command.name;
  std::atomic<int> calls = 0;
  std::string path;
  Result<> result;
  {
    const Hooked hooked([&](const FileCall& call) {
      if (calls++ != nth) return 0;
      failed = call.name;
      path = call.path;
      return errnum;
    });
    result = command.run(chain);
  }
  const std::string what =
      fmt::format("{}: {} {} fails with {}", command.name, failed, path, errnum);
  EXPECT_TRUE(command.whole(chain)) << what;
  if (result) {
    EXPECT_TRUE(command.done(chain)) << what;
  } else {
    ++failures;
    EXPECT_FALSE(result.error().message().empty()) << what;
  }
  // Nothing is in the way of the next one, and it leaves nothing.
  if (!command.done(chain)) {
    const Result<> again = command.run(chain);
    EXPECT_TRUE(again) << what << ", then " << again.error().message();
  }
  EXPECT_TRUE(command.done(chain) && command.whole(chain)) << what;
  EXPECT_TRUE(CollectGarbage(chain.store(), false)) << what;
  EXPECT_EQ(NamesIn(chain.store()), command.left) << what;
  EXPECT_TRUE(result || calls > nth) << command.name;
  return calls > nth;
}

TEST(Crash, AnErrorOfAnySystemCallIsToldAndNothingIsLost) {
  const std::vector<int> all = {ENOSPC, EIO, EMFILE, ENOMEM};
  std::set<std::string> names;
  for (const Command& command : kCommands) {
    // All four for one command, in rotation for the others: what is done about them is the same.
    const size_t rounds = &command == &kCommands.front() ? all.size() : 1;
    for (size_t round = 0; round < rounds; ++round) {
      int failures = 0;
      int nth = 0;
      std::string name;
      const auto errnum = [&] { return all[(round + static_cast<size_t>(nth)) % all.size()]; };
      while (FailNth(command, nth, errnum(), name, failures)) {
        names.insert(name);
        ++nth;
      }
      EXPECT_GT(nth, 20) << command.name;
      EXPECT_GT(failures, nth / 3) << command.name << ", " << nth << " calls";  // most matter
    }
  }
  for (const char* name : {"pwrite", "write", "io_uring write", "fsync", "rename", "exchange",
                           "link", "unlink", "flock", "mkdtemp", "ftruncate", "fallocate"}) {
    EXPECT_TRUE(names.contains(name)) << name << " never had its turn";
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
    struct stat info{};
    if (::fstat(fd, &info) == 0) Keep(path, info);
  }
  // What a machine would find after a loss of power now. Names that no fsync of their directory has
  // made durable may be lost or not: with `names` all of them made it, otherwise none.
  void Rebuild(const std::string& to, bool names) const { Rebuild(root_, to, names); }

 private:
  using Key = std::pair<dev_t, ino_t>;

  void Remember(const std::string& path, bool recursive) {
    struct stat info{};
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
        struct stat entry{};
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
    struct stat info{};
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
        struct stat info{};
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
    Chain chain;
    ASSERT_OK(command.prepare(chain));
    Disk disk(chain.store());
    int crashes = 0;
    const auto crash = [&](const std::string& when, bool finished) {
      for (const bool names : {false, true}) {
        const TemporaryDirectory place;
        const std::string found = place.path() + "/store";
        disk.Rebuild(found, names);
        const std::string what = fmt::format("{}: power lost {}, {} names kept", command.name, when,
                                             names ? "all" : "durable");
        ++crashes;
        chain.LookAt(found);
        EXPECT_TRUE(command.durable ? command.whole(chain) : ShowsTree(chain)) << what;
        EXPECT_TRUE(!finished || !command.durable || command.done(chain)) << what;
        chain.LookAt("");
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
    EXPECT_GE(crashes, 4) << command.name;
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
      ASSERT_TRUE(ShowsTree(chain)) << point;
      if (collect) {
        ASSERT_OK(CollectGarbage(chain.store(), false));
      } else {
        ASSERT_OK(Flatten({chain.image(), {}, {}}));
      }
      EXPECT_EQ(ListDirectory(chain.store()).value(), std::vector<std::string>{"image"}) << point;
      ASSERT_TRUE(ShowsTree(chain)) << point;
    }
  }
}

#endif  // UNMOOR_FAULT_POINTS

}  // namespace
}  // namespace unmoor
