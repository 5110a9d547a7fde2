// `unmoor`: finds the command, configures only that one, runs it.
//
// Everything after the first "--" belongs to criu and is kept away from CLI11.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/log.h"
#include "command.h"

namespace unmoor::cli {
namespace {

constexpr CommandEntry kCommands[] = {
    {"dump", "Write a process and its children into an image directory", true, ConfigureDump},
    {"restore", "Run a checkpoint again, mapping its memory from the image", true,
     ConfigureRestore},
    {"record", "Note which pages a program touches, for the next restore to read first", false,
     ConfigureRecord},
    {"reorder", "Put the recorded pages next to one another on the disk", false, ConfigureReorder},
    {"remap", "Make a restored process independent of its image, now", false, ConfigureRemap},
    {"status", "Is a process independent of its image: READY, LATER or NEVER", false,
     ConfigureStatus, 3},
    {"wait", "Wait until a process is READY", false, ConfigureWait, 3},
    {"show", "What an image directory holds", false, ConfigureShow},
    {"verify", "Is an image directory undamaged; repair it from a copy", false, ConfigureVerify},
    {"export", "Write a plain CRIU directory, which stock criu restores", false, ConfigureExport},
    {"import", "Make an image directory of a plain CRIU directory", false, ConfigureImport},
    {"flatten", "Merge the layers of a chain into one", false, ConfigureFlatten},
    {"diff", "What memory differs between two images", false, ConfigureDiff},
    {"pack", "Compress the layers of an image directory", false, ConfigurePack},
    {"unpack", "Make a packed image directory mappable again", false, ConfigureUnpack},
    {"log", "The generations in a store: when, after which, how much was written", false,
     ConfigureLog},
    {"rm", "Remove image directories", false, ConfigureRemove},
    {"gc", "Remove what killed commands left in a store", false, ConfigureCollect},
    {"bench", "Time the ways to restore an image, on one's own program", false, ConfigureBench},
    {"check", "What works on this machine, what not, and what to do", false, ConfigureCheck},
    {"version", "Print the version", false, ConfigureVersion},
};

constexpr char kFooter[] =
    "\nunmoor COMMAND --help tells more. Exit codes: 0 success, 1 the machine failed, 2 wrong "
    "use;\n"
    "status and wait: 0 READY, 1 LATER, 2 NEVER, 3 error; verify: 3 damaged.\n"
    "\nA first round:\n"
    "  unmoor check\n"
    "  unmoor dump -t 4711 -D /var/tmp/image\n"
    "  unmoor restore -D /var/tmp/image -d\n"
    "  unmoor wait -t 4711\n";

const CommandEntry* FindCommand(int argc, char** argv) {
  for (const CommandEntry& entry : kCommands) {
    if (argc > 1 && std::strcmp(argv[1], entry.name) == 0) return &entry;
  }
  return nullptr;
}

// The user's mistake; as JSON when that was asked for, since the options were not understood.
int Usage(const std::string& message, const CommandEntry* entry, int argc, char** argv) {
  const int code = entry == nullptr ? kExitUser : entry->usage_exit;
  for (int i = 2; i < argc && std::strcmp(argv[i], "--") != 0; ++i) {
    if (std::strcmp(argv[i], "--json") != 0) continue;
    PrintJson({{"error", message}, {"exit_code", code}});
    return code;
  }
  std::fprintf(stderr, "unmoor: %s\nTry 'unmoor %s--help'.\n", message.c_str(),
               entry == nullptr ? "" : (std::string(entry->name) + " ").c_str());
  return code;
}

int RunCommand(const CommandEntry& entry, int argc, char** argv) {
  Invocation invocation;
  int own = argc;
  for (int i = 2; i < argc; ++i) {
    if (std::strcmp(argv[i], "--") != 0) continue;
    own = i;
    invocation.criu_arguments.assign(argv + i + 1, argv + argc);
    break;
  }
  if (own != argc && !entry.takes_criu_arguments) {
    return Usage(fmt::format("{} passes nothing on to criu, so '--' has no place here", entry.name),
                 &entry, argc, argv);
  }
  CLI::App app(entry.summary, std::string("unmoor ") + entry.name);
  const Action action = entry.configure(app);
  try {
    app.parse(own - 1, argv + 1);
  } catch (const CLI::CallForHelp&) {
    const std::string help = app.help();
    Print(help);
    return kExitSuccess;
  } catch (const CLI::ParseError& error) {
    return Usage(error.what(), &entry, argc, argv);
  }
  return action(invocation);
}

int Main(int argc, char** argv) {
  const CommandEntry* const entry = FindCommand(argc, argv);
  if (entry != nullptr) return RunCommand(*entry, argc, argv);

  const std::string word = argc > 1 ? argv[1] : "";
  if (word == "--version" || word == "-V") {
    char* version[] = {argv[0], const_cast<char*>("version"), nullptr};
    return RunCommand(*FindCommand(2, version), 2, version);
  }
  std::string help =
      "unmoor: checkpoint, restore by mapping, and independence afterwards\n\nUsage: unmoor "
      "COMMAND [OPTIONS]\n\nCommands:\n";
  for (const CommandEntry& command : kCommands) {
    help += fmt::format("  {:<10}{}\n", command.name, command.summary);
  }
  help += kFooter;
  if (word == "--help" || word == "-h" || word == "help") {
    Print(help);
    return kExitSuccess;
  }
  if (word.empty()) {
    std::fwrite(help.data(), 1, help.size(), stderr);
    return kExitUser;
  }
  return Usage(fmt::format("there is no command '{}'", word), nullptr, argc, argv);
}

}  // namespace
}  // namespace unmoor::cli

int main(int argc, char** argv) {
  unmoor::InitLogging(0);
  return unmoor::cli::Main(argc, argv);
}
