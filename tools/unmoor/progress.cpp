// See progress.h.
#include "progress.h"

#include <algorithm>
#include <cstdio>

#include "os/process_control.h"

namespace unmoor::cli {
namespace {

constexpr int kStderr = 2;
constexpr Nanos kRedraw{50'000'000};
constexpr Nanos kPlainLine{2'000'000'000};
constexpr Nanos kSamePlainLine{10'000'000'000};

void WriteStderr(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
}

}  // namespace

ProgressBar::ProgressBar(std::string label, bool silent)
    : label_(std::move(label)), silent_(silent), terminal_(IsTerminal(kStderr)) {
  told_at_ = MonotonicNow();
}

void ProgressBar::Show(Bytes done, Bytes total, const std::string& note) {
  if (silent_) return;
  const Nanos now = MonotonicNow();
  if (now - told_at_ < (terminal_ ? kRedraw : kPlainLine)) return;
  const double share =
      total.value == 0
          ? 1.0
          : std::min(1.0, static_cast<double>(done.value) / static_cast<double>(total.value));
  std::string text =
      fmt::format("{:3.0f} %  {} of {}", share * 100, HumanBytes(done), HumanBytes(total));
  if (!terminal_ && text == told_ && now - told_at_ < kSamePlainLine) return;
  told_at_ = now;
  told_ = text;
  if (!note.empty()) text += "  " + note;
  if (!terminal_) {
    WriteStderr(fmt::format("unmoor: {}: {}\n", label_, text));
    return;
  }
  const int room = TerminalWidth(kStderr) - static_cast<int>(label_.size() + text.size()) - 6;
  const int width = std::clamp(room, 0, 40);
  const int full = static_cast<int>(share * width);
  std::string bar;
  for (int i = 0; i < width; ++i) bar += i < full ? "█" : "░";
  WriteStderr(fmt::format("\r\x1b[K{} {} {}", label_, bar, text));
  drawn_ = true;
}

void ProgressBar::Clear() {
  if (drawn_) WriteStderr("\r\x1b[K");
  drawn_ = false;
}

std::string DescribeProgress(const RemapReport& report) {
  std::string text;
  if (report.copy_rate > 0) {
    const auto rate = static_cast<uint64_t>(report.copy_rate);
    text = HumanBytes(Bytes(rate)) + "/s";
    const Bytes gone = report.done + report.dropped;
    if (gone < report.total && report.done.value > 0 && report.elapsed.value > 0) {
      const double per_byte =
          static_cast<double>(report.elapsed.value) / static_cast<double>(report.done.value);
      const double left = per_byte * static_cast<double>((report.total - gone).value);
      text += fmt::format(", {} left", HumanTime(Nanos(static_cast<int64_t>(left))));
    }
  }
  if (report.longest_pause.value > 0) {
    if (!text.empty()) text += ", ";
    text += "longest pause " + HumanTime(report.longest_pause);
  }
  return text;
}

}  // namespace unmoor::cli
