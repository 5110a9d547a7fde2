// Crew: threads that take numbered pieces of work, each the next one, until all are done.
//
// The first error ends the work: nobody takes another piece then, and it is what Run returns.
// Run's caller looks on: `look` is called some fifty times a second from its thread, with what has
// been done so far, and may end the work by an error of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor {

class Crew {
 public:
  using Look = std::function<Result<>(Bytes done)>;

  explicit Crew(size_t pieces) : pieces_(pieces) {}

  [[nodiscard]] std::optional<size_t> Next() {
    if (failed_.load()) return std::nullopt;
    const size_t piece = next_.fetch_add(1);
    return piece < pieces_ ? std::optional(piece) : std::nullopt;
  }
  void Done(uint64_t bytes) { done_ += bytes; }
  [[nodiscard]] bool failed() const { return failed_.load(); }

  // Runs `body(crew)`, which returns a Result<>, in each of the threads; as many as there are
  // processors where `threads` is 0. `look` may be empty.
  template <class Body>
  [[nodiscard]] Result<> Run(unsigned threads, const Look& look, Body body) {
    constexpr size_t kMaxThreads = 64;
    if (threads == 0) threads = std::thread::hardware_concurrency();
    const size_t count =
        std::clamp<size_t>(threads, 1, std::clamp<size_t>(pieces_, 1, kMaxThreads));
    std::vector<std::thread> pool;
    size_t running = count;
    for (size_t i = 0; i < count; ++i) {
      pool.emplace_back([&] {
        Keep(body(*this));
        const std::lock_guard lock(mutex_);
        --running;
        ended_.notify_one();
      });
    }
    {
      std::unique_lock lock(mutex_);
      while (!ended_.wait_for(lock, std::chrono::milliseconds(20), [&] { return running == 0; })) {
        if (!look) continue;
        lock.unlock();
        Keep(look(Bytes(done_.load())));
        lock.lock();
      }
    }
    for (std::thread& thread : pool) thread.join();
    if (look) Keep(look(Bytes(done_.load())));
    if (error_) return Failure(*error_);
    return {};
  }

 private:
  void Keep(Result<> result) {
    if (result) return;
    const std::lock_guard lock(mutex_);
    failed_ = true;
    if (!error_) error_ = std::move(result).error();
  }

  const size_t pieces_;
  std::atomic<size_t> next_{0};
  std::atomic<uint64_t> done_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;  // guards error_ and Run's count
  std::condition_variable ended_;
  std::optional<Error> error_;
};

}  // namespace unmoor
