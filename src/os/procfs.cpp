// See procfs.h.
#include "os/procfs.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>

#include "os/file.h"

namespace unmoor {
namespace {

constexpr Bytes kMapsLimit(uint64_t{1} << 30);

// Splits off the next word of `line`.
std::string_view NextWord(std::string_view& line) {
  const size_t begin = line.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return line = {};
  const size_t end = std::min(line.find_first_of(" \t", begin), line.size());
  const std::string_view word = line.substr(begin, end - begin);
  line.remove_prefix(end);
  return word;
}

// Splits off the next line of `text`.
std::string_view NextLine(std::string_view& text) {
  const size_t end = std::min(text.find('\n'), text.size());
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  return line;
}

template <class T>
bool Parse(std::string_view text, int base, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  return error == std::errc() && end == text.data() + text.size();
}

bool ParseMapsLine(std::string_view line, VmaInfo& vma) {
  const std::string_view range = NextWord(line);
  const size_t dash = range.find('-');
  if (dash == std::string_view::npos) return false;
  const std::string_view perms = NextWord(line);
  const std::string_view offset = NextWord(line);
  const std::string_view device = NextWord(line);
  const std::string_view inode = NextWord(line);
  const size_t colon = device.find(':');
  if (perms.size() != 4 || colon == std::string_view::npos) return false;
  if (!Parse(range.substr(0, dash), 16, vma.range.begin.value) ||
      !Parse(range.substr(dash + 1), 16, vma.range.end.value) ||
      !Parse(offset, 16, vma.offset.value) || !Parse(device.substr(0, colon), 16, vma.dev_major) ||
      !Parse(device.substr(colon + 1), 16, vma.dev_minor) || !Parse(inode, 10, vma.inode)) {
    return false;
  }
  vma.prot = (perms[0] == 'r' ? PROT_READ : 0) | (perms[1] == 'w' ? PROT_WRITE : 0) |
             (perms[2] == 'x' ? PROT_EXEC : 0);
  vma.shared = perms[3] == 's';
  const size_t name = line.find_first_not_of(' ');
  vma.name = name == std::string_view::npos ? "" : std::string(line.substr(name));
  return true;
}

void ParseSmapsField(std::string_view line, VmaInfo& vma) {
  const size_t colon = line.find(':');
  const std::string_view key = line.substr(0, colon);
  std::string_view rest = line.substr(colon + 1);
  if (key == "VmFlags") {
    for (std::string_view flag = NextWord(rest); !flag.empty(); flag = NextWord(rest)) {
      vma.vm_flags.emplace_back(flag);
    }
    return;
  }
  Bytes* field = key == "Rss"             ? &vma.rss
                 : key == "Anonymous"     ? &vma.anonymous
                 : key == "AnonHugePages" ? &vma.anon_huge_pages
                 : key == "Locked"        ? &vma.locked
                                          : nullptr;
  if (field == nullptr) return;
  uint64_t kib = 0;
  if (Parse(NextWord(rest), 10, kib)) *field = Bytes(kib << 10);
}

Result<std::vector<VmaInfo>> ReadVmas(Pid pid, const char* file) {
  const std::string path = fmt::format("/proc/{}/{}", pid.value, file);
  UNMOOR_ASSIGN(const std::string text, ReadFile(path, kMapsLimit));
  return ParseVmas(text, path);
}

Result<std::vector<Pid>> ReadNumericNames(const std::string& path) {
  UNMOOR_ASSIGN(const std::vector<std::string> names, ListDirectory(path));
  std::vector<Pid> pids;
  for (const std::string& name : names) {
    if (Pid pid; Parse(name, 10, pid.value)) pids.push_back(pid);
  }
  return pids;
}

}  // namespace

Result<std::vector<VmaInfo>> ParseVmas(std::string_view text, const std::string& path) {
  std::vector<VmaInfo> vmas;
  VmaInfo twice;
  VmaInfo* of_fields = nullptr;
  for (size_t at = 0; at < text.size();) {
    const size_t line_end = std::min(text.find('\n', at), text.size());
    const std::string_view line = text.substr(at, line_end - at);
    at = line_end + 1;
    if (VmaInfo vma; ParseMapsLine(line, vma)) {
      const Vaddr known = vmas.empty() ? Vaddr() : vmas.back().range.end;
      if (vma.range.end <= known) {
        of_fields = &twice;
        continue;
      }
      if (vma.range.begin < known) {
        vma.offset = vma.offset + (known - vma.range.begin);
        vma.range.begin = known;
      }
      of_fields = &vmas.emplace_back(std::move(vma));
    } else if (of_fields != nullptr && line.find(':') != std::string_view::npos) {
      ParseSmapsField(line, *of_fields);
    } else {
      return MachineError("cannot understand {}: \"{}\"", path, line);
    }
  }
  return vmas;
}

bool VmaInfo::HasFlag(std::string_view flag) const {
  return std::ranges::find(vm_flags, flag) != vm_flags.end();
}

bool VmaInfo::IsPrivateAnonymous() const {
  return !shared && inode == 0 && dev_major == 0 && dev_minor == 0 &&
         (name.empty() || name == "[heap]" || name == "[stack]" || name.starts_with("[anon:"));
}

Result<std::vector<VmaInfo>> ReadMaps(Pid pid) {
  return ReadVmas(pid, "maps");
}
Result<std::vector<VmaInfo>> ReadSmaps(Pid pid) {
  return ReadVmas(pid, "smaps");
}

Result<ProcessInfo> ReadProcess(Pid pid) {
  const std::string base = fmt::format("/proc/{}", pid.value);
  ProcessInfo info;
  UNMOOR_ASSIGN(const std::string status, ReadFile(base + "/status"));
  bool has_memory = false;
  for (std::string_view lines = status; !lines.empty();) {
    std::string_view rest = NextLine(lines);
    const size_t colon = rest.find(':');
    if (colon == std::string_view::npos) continue;
    const std::string_view key = rest.substr(0, colon);
    rest.remove_prefix(colon + 1);
    if (key == "Name") info.name = std::string(rest.substr(std::min<size_t>(1, rest.size())));
    if (key == "State") info.state = NextWord(rest).front();
    if (key == "Tgid") Parse(NextWord(rest), 10, info.pid.value);
    if (key == "PPid") Parse(NextWord(rest), 10, info.parent.value);
    if (key == "TracerPid") Parse(NextWord(rest), 10, info.tracer.value);
    if (key == "VmSize") has_memory = true;
    if (key == "Uid") {
      NextWord(rest);
      Parse(NextWord(rest), 10, info.uid);
    }
    if (key == "NSpid") {
      int id = 0;
      for (auto word = NextWord(rest); Parse(word, 10, id); word = NextWord(rest)) {
        info.ns_pids.push_back(id);
      }
    }
  }
  info.kernel_thread = !has_memory && !info.ended();
  UNMOOR_ASSIGN(const std::string stat, ReadFile(base + "/stat"));
  // Field 22, counted after the closing parenthesis of comm, which may hold anything.
  std::string_view rest = std::string_view(stat).substr(std::min(stat.rfind(')') + 1, stat.size()));
  for (int field = 3; field < 22; ++field) NextWord(rest);
  Parse(NextWord(rest), 10, info.start_time);
  for (int field = 23; field < 47; ++field) NextWord(rest);
  Parse(NextWord(rest), 10, info.start_brk.value);
  return info;
}

Result<SignalSets> ReadSignalSets(Pid pid) {
  SignalSets sets;
  UNMOOR_ASSIGN(const std::string status, ReadFile(fmt::format("/proc/{}/status", pid.value)));
  for (std::string_view lines = status; !lines.empty();) {
    std::string_view rest = NextLine(lines);
    const std::string_view key = NextWord(rest);
    if (key == "State:") sets.state = (std::string(NextWord(rest)) + '?').front();
    if (key == "SigPnd:") Parse(NextWord(rest), 16, sets.pending);
    if (key == "SigBlk:") Parse(NextWord(rest), 16, sets.blocked);
    if (key == "SigIgn:") Parse(NextWord(rest), 16, sets.ignored);
    if (key == "SigCgt:") Parse(NextWord(rest), 16, sets.caught);
  }
  return sets;
}

size_t ThreadCalls::waiting_for_event() const {
  return static_cast<size_t>(std::ranges::count_if(blocked, &BlockedCall::waits_for_event));
}

namespace {

// The state letter of a thread's stat: what follows the name, which may hold anything.
char ThreadState(const std::string& directory) {
  const auto stat = ReadFile(directory + "/stat");
  const size_t name_end = stat ? stat->rfind(')') : std::string::npos;
  return name_end == std::string::npos || name_end + 2 >= stat->size() ? '?'
                                                                       : (*stat)[name_end + 2];
}

// In a system call that waits for its userfaultfd event to be read.
bool WaitsForEvent(const std::string& directory) {
  const auto waits_in = ReadFile(directory + "/wchan");
  return waits_in && waits_in->starts_with("userfaultfd_event_wait");
}

}  // namespace

bool SleepsInCall(Pid pid, uint64_t number) {
  const auto text = ReadFile(fmt::format("/proc/{}/syscall", pid.value));
  return text && text->starts_with(fmt::format("{} ", number));
}

Result<bool> IsStopped(Pid pid) {
  UNMOOR_ASSIGN(const std::vector<Pid> threads, ReadThreads(pid));
  return std::ranges::all_of(threads, [&](Pid thread) {
    constexpr std::string_view kStands = "tTZX?";
    return kStands.find(ThreadState(fmt::format("/proc/{}/task/{}", pid.value, thread.value))) !=
           std::string_view::npos;
  });
}

Result<ThreadCalls> ReadThreadCalls(Pid pid) {
  UNMOOR_ASSIGN(const std::vector<Pid> threads, ReadThreads(pid));
  ThreadCalls calls;
  for (const Pid thread : threads) {
    const std::string directory = fmt::format("/proc/{}/task/{}", pid.value, thread.value);
    const auto text = ReadFile(directory + "/syscall");
    if (!text) continue;  // that thread ended
    std::string_view rest = *text;
    ++calls.threads;
    const char state = ThreadState(directory);
    if (state == 't') ++calls.stopped;
    if (state == 'R') ++calls.runnable;
    BlockedCall call;
    call.thread = thread;
    // "running", or "-1" where it sleeps outside a system call.
    if (!Parse(NextWord(rest), 10, call.number)) continue;
    for (uint64_t& arg : call.args) {
      const std::string_view word = NextWord(rest);
      if (word.starts_with("0x")) Parse(word.substr(2), 16, arg);
    }
    call.waits_for_event = WaitsForEvent(directory);
    calls.blocked.push_back(call);
  }
  calls.threads = std::max(calls.threads, CountThreads(pid).value_or(0));
  return calls;
}

Result<size_t> CountThreads(Pid pid) {
  const std::string path = fmt::format("/proc/{}/task", pid.value);
  struct stat status{};
  if (::stat(path.c_str(), &status) < 0) return SystemError(errno, path);
  return status.st_nlink - 2;
}

Result<std::vector<Pid>> ReadThreads(Pid pid) {
  constexpr int kLooks = 20;
  const std::string path = fmt::format("/proc/{}/task", pid.value);
  for (int looks = 1;; ++looks) {
    UNMOOR_ASSIGN(std::vector<Pid> threads, ReadNumericNames(path));
    const auto count = CountThreads(pid);
    const auto is_there = [&](Pid thread) {
      return thread == pid || ::access(fmt::format("{}/{}", path, thread.value).c_str(), F_OK) == 0;
    };
    const bool complete = count == threads.size() && std::ranges::all_of(threads, is_there);
    if (complete || looks == kLooks) return threads;
  }
}

Result<std::vector<Pid>> ReadChildren(Pid pid) {
  UNMOOR_ASSIGN(const std::vector<Pid> threads, ReadThreads(pid));
  std::vector<Pid> children;
  for (const Pid thread : threads) {
    const std::vector<Pid> its = ReadChildrenOf(pid, thread);
    children.insert(children.end(), its.begin(), its.end());
  }
  return children;
}

std::vector<Pid> ReadChildrenOf(Pid pid, Pid thread) {
  std::vector<Pid> children;
  const auto text = ReadFile(fmt::format("/proc/{}/task/{}/children", pid.value, thread.value));
  if (!text) return children;  // that thread ended
  std::string_view rest = *text;
  Pid child;
  for (auto word = NextWord(rest); Parse(word, 10, child.value); word = NextWord(rest)) {
    children.push_back(child);
  }
  return children;
}

bool MayBeForking(Pid pid, Pid thread) {
  const std::string directory = fmt::format("/proc/{}/task/{}", pid.value, thread.value);
  const char state = ThreadState(directory);
  // A stop comes at the end of a system call, never inside fork.
  if (state == '?' || state == 't' || state == 'T' || state == 'Z' || state == 'X') return false;
  const auto text = ReadFile(directory + "/syscall");
  if (!text) return false;
  uint64_t number = 0;
  std::string_view rest = *text;
  if (!Parse(NextWord(rest), 10, number)) return text->starts_with("running");
  return number == SYS_fork || number == SYS_clone || number == SYS_clone3;
}

std::optional<Nanos> RunTimeIfRunnable(Pid pid, Pid thread) {
  const std::string directory = fmt::format("/proc/{}/task/{}", pid.value, thread.value);
  const auto text = ReadFile(directory + "/schedstat");
  if (!text || ThreadState(directory) != 'R') return std::nullopt;
  int64_t time = 0;
  std::string_view rest = *text;
  if (!Parse(NextWord(rest), 10, time)) return std::nullopt;
  return Nanos(time);
}

Result<std::vector<Pid>> ReadTree(Pid root) {
  std::vector<Pid> tree = {root};
  for (size_t i = 0; i < tree.size(); ++i) {
    const auto children = ReadChildren(tree[i]);
    if (!children && i == 0) return Failure(children.error());
    if (children) tree.insert(tree.end(), children->begin(), children->end());
  }
  return tree;
}

std::vector<Pid> ListProcesses() {
  return ReadNumericNames("/proc").value_or(std::vector<Pid>());
}

}  // namespace unmoor
