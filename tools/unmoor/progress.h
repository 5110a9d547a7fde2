// ProgressBar: one line that grows on a terminal; elsewhere a plain line every two seconds, every
// ten while the numbers are the same.
//
// Writes to stderr, so stdout stays for results. Says nothing at all when made silent (--json).
// Calls may come from any one thread at a time.
#pragma once

#include <string>

#include "agent/agent.h"
#include "base/units.h"

namespace unmoor::cli {

class ProgressBar {
 public:
  explicit ProgressBar(std::string label, bool silent);
  ~ProgressBar() { Clear(); }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  // `note` follows the numbers ("1.2 GiB/s, longest pause 0.8 ms").
  void Show(Bytes done, Bytes total, const std::string& note = {});
  // Removes the bar from the terminal, so that something else can be written.
  void Clear();

 private:
  std::string label_;
  bool silent_;
  bool terminal_;
  bool drawn_ = false;
  Nanos told_at_;
  std::string told_;
};

// "1.2 GiB/s, 3 s left, longest pause 0.8 ms".
[[nodiscard]] std::string DescribeProgress(const RemapReport& report);

}  // namespace unmoor::cli
