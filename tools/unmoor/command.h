// What every command of `unmoor` shares: its place in the table, exit codes, the --json rule.
//
// A command is one file. It describes its options to CLI11 in Configure and does its work in Run,
// which returns the exit code. Only the chosen command is configured, so start-up stays cheap.
// Exit codes: 0 success, 1 the machine failed, 2 the user's mistake (docs/cli.md); status and wait
// have their own.
#pragma once

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace unmoor::cli {

inline constexpr int kExitSuccess = 0;
inline constexpr int kExitMachine = 1;
inline constexpr int kExitUser = 2;

// What comes from outside the command's own options.
struct Invocation {
  std::vector<std::string> criu_arguments;  // everything after "--"
};

using Action = std::function<int(const Invocation&)>;

struct CommandEntry {
  const char* name;
  const char* summary;
  bool takes_criu_arguments;
  Action (*configure)(CLI::App&);  // adds options; the returned action owns their values
  int usage_exit = kExitUser;
};

Action ConfigureCheck(CLI::App& app);
Action ConfigureDump(CLI::App& app);
Action ConfigureRestore(CLI::App& app);
Action ConfigureRecord(CLI::App& app);
Action ConfigureReorder(CLI::App& app);
Action ConfigureBench(CLI::App& app);
Action ConfigureRemap(CLI::App& app);
Action ConfigureStatus(CLI::App& app);
Action ConfigureWait(CLI::App& app);
Action ConfigureShow(CLI::App& app);
Action ConfigureVerify(CLI::App& app);
Action ConfigureExport(CLI::App& app);
Action ConfigureImport(CLI::App& app);
Action ConfigureFlatten(CLI::App& app);
Action ConfigureDiff(CLI::App& app);
Action ConfigurePack(CLI::App& app);
Action ConfigureUnpack(CLI::App& app);
Action ConfigureLog(CLI::App& app);
Action ConfigureRemove(CLI::App& app);
Action ConfigureCollect(CLI::App& app);
Action ConfigureVersion(CLI::App& app);

// The first line of --help: "Usage: unmoor dump -t PID …".
void SetUsage(CLI::App& app, const std::string& usage);

// "unmoor: message" on stderr, or {"error": message} on stdout; the exit code for the error's kind.
int Report(const Error& error, bool json);
// On stdout, as it is.
void Print(std::string_view text);
// The one JSON object of a --json run.
void PrintJson(const nlohmann::json& object);

// "1ms", "500us", "2s", "1500000ns", or a plain number of `unit` nanoseconds.
[[nodiscard]] Result<Nanos> ParseDuration(const std::string& text, int64_t unit);
// "2026-11-21T18:00:00Z".
[[nodiscard]] std::string Date(Nanos since_1970);
// A positive process id.
[[nodiscard]] Result<Pid> ParsePid(const std::string& text);

}  // namespace unmoor::cli
