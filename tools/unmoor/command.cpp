// See command.h.
#include "command.h"

#include <charconv>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>

namespace unmoor::cli {
namespace {

class UsageFormatter : public CLI::Formatter {
 public:
  explicit UsageFormatter(std::string usage) : usage_(std::move(usage)) { column_width(34); }
  std::string make_usage(const CLI::App*, std::string) const override { return usage_ + "\n"; }

 private:
  std::string usage_;
};

}  // namespace

void SetUsage(CLI::App& app, const std::string& usage) {
  app.formatter(std::make_shared<UsageFormatter>(usage));
}

int Report(const Error& error, bool json) {
  const int code = error.kind() == ErrorKind::kUser ? kExitUser : kExitMachine;
  if (json) {
    PrintJson({{"error", error.message()}, {"exit_code", code}});
  } else {
    std::fprintf(stderr, "unmoor: %s\n", error.message().c_str());
  }
  return code;
}

void Print(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
}

void PrintJson(const nlohmann::json& object) {
  const std::string text =
      object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  Print(text);
}

Result<Nanos> ParseDuration(const std::string& text, int64_t unit) {
  double number = 0;
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, number);
  const std::string_view suffix(parsed.ptr, static_cast<size_t>(end - parsed.ptr));
  double scale = 0;
  if (suffix.empty()) scale = static_cast<double>(unit);
  if (suffix == "ns") scale = 1;
  if (suffix == "us") scale = 1e3;
  if (suffix == "ms") scale = 1e6;
  if (suffix == "s") scale = 1e9;
  if (suffix == "min") scale = 60e9;
  if (parsed.ec != std::errc() || scale == 0 || !(number >= 0) || number * scale > 9e18) {
    return UserError("'{}' is not a duration; write it like 500us, 1ms or 2s", text);
  }
  return Nanos(static_cast<int64_t>(number * scale));
}

Result<Pid> ParsePid(const std::string& text) {
  int value = 0;
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value);
  if (parsed.ec != std::errc() || parsed.ptr != end || value <= 0) {
    return UserError("'{}' is not a process id", text);
  }
  return Pid{value};
}

std::string Date(Nanos since_1970) {
  const std::time_t seconds = since_1970.value / 1'000'000'000;
  std::tm parts{};
  char text[32];
  if (::gmtime_r(&seconds, &parts) == nullptr) return "?";
  return {text, std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts)};
}

}  // namespace unmoor::cli
