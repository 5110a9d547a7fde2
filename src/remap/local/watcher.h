// Watcher: what one process has once, however many remappers and trackers it runs: the userfaultfd
// that watches its direct-mapped and tracked memory, the thread that answers its events, the freeze
// signal's handler, and what fork must do to all of this.
//
// Lives as long as somebody holds it. Every method is thread-safe. In a forked child the Watcher of
// the parent is an empty shell (IsOfThisProcess() is false) and Get() makes a new one.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "os/fd.h"
#include "remap/local/window.h"

namespace unmoor::local {

class Watcher {
 public:
  // `freeze_signal` 0: the default.
  [[nodiscard]] static Result<std::shared_ptr<Watcher>> Get(int freeze_signal);
  ~Watcher();
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;

  [[nodiscard]] const Descriptors& fds() const { return descriptors_; }
  [[nodiscard]] bool IsOfThisProcess() const;
  // Writes there are seen and events answered from here on.
  [[nodiscard]] Result<> Watch(VaddrRange range);
  // Parts that are unmapped or not watched are passed over.
  void Unwatch(VaddrRange range);

  // Ranges only one may have. False: part of one is taken.
  [[nodiscard]] bool Claim(std::span<const VaddrRange> ranges);
  void Disclaim(std::span<const VaddrRange> ranges);
  // Something of this process will never be remapped, says `who`, whose first reason is kept until
  // it says that it is gone.
  void NoteRefusal(const void* who, const std::string& reason);
  void ForgetRefusal(const void* who);
  // Of the Watcher there is, if any. Empty: nothing was refused.
  [[nodiscard]] static std::string Refusal();

 private:
  Watcher() = default;
  [[nodiscard]] Result<> Begin(int freeze_signal);
  void ServeLoop();

  int owner_ = 0;
  Descriptors descriptors_;
  Fd uffd_, maps_, pagemap_, memory_, tasks_, stop_;
  std::thread thread_;
  std::mutex mutex_;
  std::vector<VaddrRange> claimed_;
  std::map<const void*, std::string> refusals_;
};

// A thread of the remapper. It rests in the windows of others like any thread of the program, since
// it too allocates.
[[nodiscard]] Result<std::thread> StartEngineThread(const char* name, std::function<void()> body);

}  // namespace unmoor::local
