// Freestanding. What the engine does to this process's address space: windows (recheck and swap)
// and the answers to userfaultfd events. Nothing in here allocates or takes a lock of the C
// library's: in a window threads stand still with whatever locks they hold, and a thread that waits
// for its event to be read may hold the allocator's.
//
// Locks, in this order: window (one window at a time; fork holds it), address_space (a window's
// body, or the handling of events). Whoever holds one of them must not allocate.
#pragma once

#include <cstdint>

#include "os/raw_syscall.h"

namespace unmoor::local {

struct Locks {
  raw::Lock window;
  raw::Lock address_space;
};
extern Locks locks;

// Of this process, for as long as anything of it is watched.
struct Descriptors {
  int uffd = -1;
  int maps = -1;
  int pagemap = -1;
  int memory = -1;
  int tasks = -1;
};

// --- what is known, under Locks::address_space --------------------------------------------------

// A page image that watched memory maps, counted. False: no room.
bool AddImage(uint64_t device, uint64_t inode);
void RemoveImage(uint64_t device, uint64_t inode);
// How its file is read, until it is about to be closed.
void SetImageFile(uint64_t device, uint64_t inode, int fd);
void ForgetImageFile(int fd);

// Where the pages of [begin, end), a mapping of the image, are staged; at the same distances.
struct MirrorPlace {
  uint64_t begin = 0, end = 0;
  uint64_t device = 0, inode = 0;
  uint64_t offset = 0;  // file offset of begin; may wrap below zero
  uint32_t protection = 0;
  uint64_t base = 0;
};
bool AddMirror(const MirrorPlace& place);
void RemoveMirror(uint64_t base);

// Memory whose writes are remembered: bit n is page n behind `begin`.
bool AddTracked(uint64_t begin, uint64_t end, uint64_t* bits);
void RemoveTracked(uint64_t begin);
// Lock-free; from any thread.
void NoteWritten(uint64_t begin, uint64_t end);
bool IsTracked(uint64_t begin, uint64_t end);

// Puts [begin, end) under the userfaultfd. Negative: an error number. Under Locks::address_space:
// between a window's taking a range out and moving over it, nobody may put it back, or the mover
// waits for an event of its own.
long WatchMemory(int uffd, uint64_t begin, uint64_t end);

// --- windows ------------------------------------------------------------------------------------

struct WindowPiece {
  uint64_t begin = 0, end = 0;
  uint64_t mirror = 0;  // of begin
  uint64_t device = 0, inode = 0;
  uint64_t offset = 0;  // of begin
  uint32_t protection = 0;
};

struct Region {
  uint64_t start, end, categories;
};
struct Part {
  uint64_t begin, end;
  uint32_t piece;
};

// Room the caller brings, since a window cannot allocate.
struct WindowRoom {
  Part parts[1024];
  Region regions[512];
};

struct WindowResult {
  enum Outcome : uint32_t {
    kSwapped,
    kBusy,
    kTooDirty,
    kStale,
    kUnguardable,  // a thread's stack or storage lies there, or a thread could not be woken
    kFailed
  } outcome = kBusy;
  int32_t error = 0;        // errno of kFailed
  int32_t late_thread = 0;  // of kBusy
  uint32_t recopied = 0;    // pages
  bool skipped = false;     // parts not mapped as planned any more were left alone
  int64_t pause_ns = 0;     // of all threads
  int64_t guard_ns = 0;     // of writers to the piece
};

// All threads at rest; recheck, swap, release. Parts of pieces that are not mapped as planned any
// more are skipped.
WindowResult SwapFrozen(const Descriptors& fds, const WindowPiece* pieces, uint32_t count,
                        uint64_t dirty_limit, int64_t stop_limit_ns, WindowRoom& room);
// One small piece under the read-only guard.
WindowResult SwapGuarded(const Descriptors& fds, const WindowPiece& piece, uint64_t dirty_limit,
                         int64_t stop_limit_ns, WindowRoom& room);

// Watched memory that maps a known image.
struct MappedPart {
  uint64_t begin, end;
  uint64_t device, inode;
  uint64_t offset;  // of begin
};
struct MappedParts {
  bool open = false;   // the threads came to rest in time
  bool whole = false;  // there was room for all
  uint32_t count = 0;
};

// What is direct-mapped, seen with all threads at rest: a list read while the program moves memory
// about may miss what moves.
MappedParts FindMappedFrozen(const Descriptors& fds, int64_t stop_limit_ns, MappedPart* parts,
                             uint32_t room);

// --- events -------------------------------------------------------------------------------------

// Answers the events that wait: before any of their threads runs on in the program, what it gave
// back is anonymous and zero.
void ServeEvents(const Descriptors& fds);

// In a forked child: nothing is watched, no lock is held, mirrors are unmapped.
void ResetWindowsAfterFork();

}  // namespace unmoor::local
