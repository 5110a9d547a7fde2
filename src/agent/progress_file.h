// The progress file of one process: RuntimeDirectory()/<pid>.json, written by its worker, read by
// status and wait. Replaced as a whole, so a reader never sees half a report. It is a message, not
// the truth: whether a process is READY is read from /proc.
#pragma once

#include <optional>

#include "agent/agent.h"

namespace unmoor {

struct ProgressFile {
  Pid pid;
  uint64_t start_time = 0;  // of that process, so that a reused pid is not taken for it
  Pid worker;
  Pid supervisor;  // starts another worker when this one dies
  bool finished = false;
  std::string problem;  // why the remap does not go on, if it does not
  RemapReport report;
  bool never = false;  // the problem is for good: its image is damaged
  bool lazy = false;   // its pages are brought one by one; nothing maps an image
};

[[nodiscard]] Result<> WriteProgress(const ProgressFile& progress);
// Nothing when there is no file, or it is about an earlier process of that pid.
[[nodiscard]] std::optional<ProgressFile> ReadProgress(Pid pid);
// The agent's process to speak to, if it has not finished: the worker that wrote it, or while that
// is being replaced its supervisor.
[[nodiscard]] std::optional<Pid> AgentAtWork(const ProgressFile& progress);
// Says that `supervisor` has finished with `pid`, or why it has given up. Never fails.
void FinishProgress(Pid pid, Pid supervisor, const std::string& problem);
// Removes the files of processes that have ended, and what a killed writer left. Never fails.
void ForgetEndedProcesses();

}  // namespace unmoor
