// See unfinished_restore.h.
#include "agent/unfinished_restore.h"

#include <charconv>
#include <csignal>

#include "os/file.h"
#include "os/process_control.h"
#include "os/process_tree.h"
#include "os/procfs.h"

namespace unmoor {
namespace {

constexpr Nanos kLookAgain(20'000'000);
constexpr Nanos kLastWords(5'000'000'000);

// criu sends SIGSTOP to what it has restored, which that takes when it next gets a CPU. Somebody
// else who has the id by now would not stop.
bool IsLeftStopped(Pid root) {
  constexpr Nanos kPatience(10'000'000'000);
  const Nanos began = MonotonicNow();
  for (; MonotonicNow() - began < kPatience; SleepFor(kLookAgain)) {
    const auto process = ReadProcess(root);
    if (!process || process->ended()) return false;
    if (process->state == 'T' || process->state == 't') return true;
  }
  return false;
}

}  // namespace

void UnfinishedRestore::CriuIs(Pid pid) {
  auto criu = OpenPidFd(pid);
  if (!criu) return;
  criu_ = std::move(*criu);
  criu_pid_ = pid;
}

void UnfinishedRestore::End(std::span<const Pid> tasks) {
  // Below a criu that is at work, or below nobody once it has ended.
  if (criu_.valid() && !WaitReadable(criu_.get(), Nanos(0)).value_or(true)) KillTree(criu_pid_);
  if (const auto text = ReadFile(view_ + "/pid", Bytes(64))) {
    Pid root;
    (void)std::from_chars(text->data(), text->data() + text->size(), root.value);
    if (IsLeftStopped(root)) KillTree(root);
  }
  for (const Pid task : tasks) (void)SendSignal(task, SIGKILL);
  RemoveView();
}

// Whoever was killed may be making its last file there, and a criu that we were not told of ends
// by itself only in a moment. What is gone stays gone: only the command made it.
void UnfinishedRestore::RemoveView() const {
  const Nanos began = MonotonicNow();
  while (Exists(view_) && MonotonicNow() - began < kLastWords) {
    if (!RemoveTree(view_)) SleepFor(kLookAgain);
  }
}

}  // namespace unmoor
