// See watcher.h.
#include "remap/local/watcher.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>

#include <algorithm>
#include <cerrno>

#include "os/file.h"
#include "os/kernel_abi.h"
#include "os/own_process.h"
#include "os/pagemap.h"
#include "os/process_control.h"
#include "os/userfaultfd.h"
#include "remap/local/fault_guard.h"
#include "remap/local/rendezvous.h"
#include "remap/local/window.h"

namespace unmoor::local {
namespace {

// One for each process, as its address space has one reader of events: see the head of watcher.h.
std::mutex current_mutex;
std::weak_ptr<Watcher> current;
Descriptors current_fds;  // for the forked child to close

// fork() takes no part in a window: it waits for one that is open, and none opens during it.
void BeforeFork() {
  current_mutex.lock();
  locks.window.Acquire();
}

void AfterForkInParent() {
  locks.window.Release();
  current_mutex.unlock();
}

void AfterForkInChild() {
  ResetAfterFork();
  ResetWindowsAfterFork();
  // The parent's userfaultfd must not outlive the parent's own use of it.
  for (const int fd : {current_fds.uffd, current_fds.maps, current_fds.pagemap, current_fds.memory,
                       current_fds.tasks}) {
    if (fd >= 0) raw::Call(__NR_close, fd);
  }
  current_fds = {};
  current.reset();
  current_mutex.unlock();
}

}  // namespace

Result<std::shared_ptr<Watcher>> Watcher::Get(int freeze_signal) {
  static const int registered = ::pthread_atfork(BeforeFork, AfterForkInParent, AfterForkInChild);
  if (registered != 0) return SystemError(registered, "pthread_atfork");
  std::unique_lock lock(current_mutex);
  if (auto watcher = current.lock(); watcher && watcher->IsOfThisProcess()) {
    if (freeze_signal != 0 && freeze_signal != FreezeSignal()) {
      return UserError("another remapper uses signal {} as its freeze signal", FreezeSignal());
    }
    return watcher;
  }
  std::shared_ptr<Watcher> watcher(new Watcher);
  if (const auto begun = watcher->Begin(freeze_signal); !begun) {
    lock.unlock();  // which its end takes
    return Failure(begun.error());
  }
  current = watcher;
  current_fds = watcher->descriptors_;
  return watcher;
}

Result<> Watcher::Begin(int freeze_signal) {
  owner_ = OwnPid().value;
  UNMOOR_ASSIGN(maps_, OpenFile("/proc/self/maps", O_RDONLY));
  UNMOOR_ASSIGN(pagemap_, OpenFile("/proc/self/pagemap", O_RDONLY));
  UNMOOR_ASSIGN(memory_, OpenFile("/proc/self/mem", O_RDWR));
  UNMOOR_ASSIGN(tasks_, OpenFile("/proc/self/task", O_RDONLY | O_DIRECTORY));
  UNMOOR_TRY(QueryVma(maps_.get(), Vaddr(0)));
  UNMOOR_ASSIGN(uffd_, CreateOwnUserFaultFd(kernel::kUffdFeatureWpAsync | UFFD_FEATURE_EVENT_REMAP |
                                            UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP));
  UNMOOR_ASSIGN(stop_, CreateEventFd());
  descriptors_ = {uffd_.get(), maps_.get(), pagemap_.get(), memory_.get(), tasks_.get()};
  // After the first thread was made: glibc installs its own handler of this signal then.
  UNMOOR_ASSIGN(thread_, StartQuietThread("unmoor-events", [this] {
                  AddEventsThread();
                  ServeLoop();
                  RemoveEventsThread();
                }));
  const long error =
      InstallFreezeHandler(freeze_signal == 0 ? kDefaultFreezeSignal : freeze_signal);
  if (error < 0) return SystemError(static_cast<int>(-error), "cannot install the freeze signal");
  return {};
}

Watcher::~Watcher() {
  if (!IsOfThisProcess()) {
    // The thread stayed in the parent and the descriptors were closed by the fork.
    if (thread_.joinable()) new std::thread(std::move(thread_));
    for (Fd* fd : {&uffd_, &maps_, &pagemap_, &memory_, &tasks_}) (void)fd->Release();
    return;
  }
  if (thread_.joinable()) {
    SignalEventFd(stop_.get());
    thread_.join();
  }
  const std::lock_guard lock(current_mutex);
  if (current_fds.uffd == uffd_.get()) current_fds = {};
  ReleaseFaultHandler();
}

bool Watcher::IsOfThisProcess() const {
  return owner_ == OwnPid().value;
}

// Not while a range is being moved over: a window takes the range's registration away first, lest
// it wait for an event of its own.
Result<> Watcher::Watch(VaddrRange range) {
  locks.address_space.Acquire();
  const long error = WatchMemory(uffd_.get(), range.begin.value, range.end.value);
  locks.address_space.Release();
  if (error < 0) {
    return SystemError(static_cast<int>(-error), fmt::format("cannot watch {}", range));
  }
  return {};
}

void Watcher::Unwatch(VaddrRange range) {
  for (Vaddr at = range.begin; at < range.end;) {
    const auto vma = QueryVma(maps_.get(), at);
    if (!vma || !*vma || (*vma)->range.begin >= range.end) return;
    const VaddrRange part = (*vma)->range.Intersect(range);
    (void)UffdUnregister(uffd_.get(), part);
    at = (*vma)->range.end;
  }
}

// Allocates nothing: a thread that waits for its event may hold the allocator's lock.
void Watcher::ServeLoop() {
  pollfd waiting[2] = {{uffd_.get(), POLLIN, 0}, {stop_.get(), POLLIN, 0}};
  for (;;) {
    if (::poll(waiting, 2, -1) < 0) continue;
    if ((waiting[0].revents & POLLIN) != 0) ServeEvents(descriptors_);
    if ((waiting[0].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0) waiting[0].fd = -1;
    if ((waiting[1].revents & POLLIN) != 0) return;
  }
}

bool Watcher::Claim(std::span<const VaddrRange> ranges) {
  const std::lock_guard lock(mutex_);
  for (const VaddrRange range : ranges) {
    if (std::ranges::any_of(claimed_, [&](VaddrRange r) { return r.Overlaps(range); })) {
      return false;
    }
  }
  claimed_.insert(claimed_.end(), ranges.begin(), ranges.end());
  return true;
}

void Watcher::Disclaim(std::span<const VaddrRange> ranges) {
  const std::lock_guard lock(mutex_);
  for (const VaddrRange range : ranges) std::erase(claimed_, range);
}

void Watcher::NoteRefusal(const void* who, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  refusals_.try_emplace(who, reason);
}

void Watcher::ForgetRefusal(const void* who) {
  const std::lock_guard lock(mutex_);
  refusals_.erase(who);
}

std::string Watcher::Refusal() {
  std::shared_ptr<Watcher> watcher;
  {
    const std::lock_guard lock(current_mutex);
    watcher = current.lock();
  }
  if (!watcher || !watcher->IsOfThisProcess()) return {};
  const std::lock_guard inner(watcher->mutex_);
  return watcher->refusals_.empty() ? std::string() : watcher->refusals_.begin()->second;
}

Result<std::thread> StartEngineThread(const char* name, std::function<void()> body) {
  return StartQuietThread(name, [body = std::move(body)] {
    UnblockFreezeSignal();
    body();
  });
}

}  // namespace unmoor::local
