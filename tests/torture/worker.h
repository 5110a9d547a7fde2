// A writer: picks one operation after another, checks what it touches before and after, and knows
// what every page of its chunks must hold.
//
// The sequence of operations follows from the seed alone (how many there are does not). No two
// writers share pages but the arena's counters, which they only add to. Where a round has a fault
// guard, chunks of quiet ranges see nothing but loads and stores, forks and signals.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "options.h"

namespace torture {

// How often each thing was done, of all writers together.
struct Tally {
  std::atomic<uint64_t> operations{0}, writes{0}, given_back{0}, moved{0}, protected_{0},
      covered{0}, forks{0}, spawned{0}, calls{0}, direct{0}, probes{0}, threads{0}, signals{0};
};

// What the writers of one round share.
struct RoundState {
  const Options* options = nullptr;
  Tally* tally = nullptr;
  std::atomic<bool> begin{false};
  std::atomic<bool> stop{false};
  std::atomic<int> ended{0};
  // Held for reading while memory is given back: only while a remapper stands by does that give
  // zeros on direct-mapped memory. The controller holds it for writing meanwhile.
  pthread_rwlock_t watched = PTHREAD_RWLOCK_INITIALIZER;
  bool crowded = false;  // many more writers than cores
  int direct_file = -1;  // opened O_DIRECT; -1: not to be had
};

class Writer {
 public:
  Writer(RoundState& round, Arena& arena, size_t index, uint64_t seed);
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  void Start();
  void Join();
  [[nodiscard]] pthread_t thread() const { return thread_; }
  [[nodiscard]] uint64_t added() const { return added_; }
  [[nodiscard]] uint64_t operations() const { return operations_.load(std::memory_order_relaxed); }

 private:
  struct Target {
    Chunk* chunk = nullptr;
    size_t page = 0;
    size_t count = 0;
  };
  static void* Main(void* self);
  void Run();
  void PrepareSignals();
  void Operate();
  [[nodiscard]] Target Pick(const std::vector<Chunk*>& from, size_t most);

  void Write();
  void Look();
  void Count();
  void GiveBack();
  void FreeLazily();
  void Protect();
  void Deny();
  void Move();
  void MoveAndBack(const Target& target);
  void TakeBack(const Target& target);
  void Remap();
  void Cover();
  void Fork(bool raw);
  void Spawn();
  void ReadPipe();
  void ReadDatagram();
  void ReadRandom();
  void ReadDirect();
  void Probe();
  void BearThread();
  void BlockSignals();
  void CheckSignalWord();
  void Sweep();
  [[noreturn]] void LiveAsChild();

  RoundState& round_;
  Arena& arena_;
  const size_t index_;
  Random random_;
  std::vector<Chunk*> all_;       // with pages in them
  std::vector<Chunk*> writable_;  // by loads and stores
  std::vector<Chunk*> loud_;      // writable, and by anything else too
  std::vector<Chunk*> secret_;    // not even readable
  Chunk* stack_ = nullptr;
  Chunk* signal_stack_ = nullptr;
  uint64_t* spare_;  // where pages are moved to for a moment
  pthread_t thread_{};
  uint64_t added_ = 0;
  std::atomic<uint64_t> operations_{0};
  uint64_t signal_word_before_ = 0;
  int pipe_[2] = {-1, -1};
  int datagrams_[2] = {-1, -1};
  std::vector<char> own_signal_stack_;
};

// The program's own handlers: SIGSEGV and SIGBUS (probes expect them, everything else fails),
// SIGUSR1 and SIGUSR2 (counted in direct-mapped memory). Once, before any remapper.
void InstallHandlers();

// Pages with known contents for O_DIRECT reads.
inline constexpr uint64_t kDirectNumber = uint64_t{1} << 60;
inline constexpr size_t kDirectPages = 64;

}  // namespace torture
