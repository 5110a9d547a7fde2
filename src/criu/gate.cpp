// See gate.h.
#include "criu/gate.h"

#include <cerrno>

#include "os/file.h"

namespace unmoor::criu {
namespace {

constexpr Bytes kTreeLimit(uint64_t{64} << 20);
constexpr char kTree[] = "/pstree.img";
constexpr char kInventory[] = "/inventory.img";
constexpr char kStatistics[] = "/stats-restore";

Result<> LinkToDescriptor(int as, const std::string& link) {
  return SymbolicLink(fmt::format("/proc/self/fd/{}", as), link);
}

}  // namespace

Result<Gate> Gate::Create(const std::string& criu_directory, const std::string& view_directory,
                          int as) {
  Gate gate;
  gate.as_ = as;
  gate.path_ = criu_directory + kTree;
  UNMOOR_ASSIGN(gate.tree_, ReadRegularFile(gate.path_, kTreeLimit));
  UNMOOR_ASSIGN(gate.hold_, Pipe::Create());
  UNMOOR_ASSIGN(gate.statistics_, Pipe::Create());
  UNMOOR_TRY(SymbolicLink(criu_directory + kInventory, view_directory + kInventory));
  UNMOOR_TRY(LinkToDescriptor(as, view_directory + kTree));
  UNMOOR_TRY(LinkToDescriptor(as + 1, view_directory + kStatistics));
  return gate;
}

bool Gate::IsPartOf(const std::string& name) {
  return "/" + name == kTree || "/" + name == kStatistics;
}

std::vector<InheritedFd> Gate::fds() const {
  return {{hold_.reader.get(), as_}, {statistics_.writer.get(), as_ + 1}};
}

void Gate::CriuStarted() {
  hold_.reader.Reset();
  statistics_.writer.Reset();
}

Result<> Gate::Open() {
  const auto written =
      WritePipe(hold_.writer.get(), std::as_bytes(std::span(tree_)), "criu's pipe for " + path_);
  hold_.writer.Reset();
  if (!written && written.error().errnum() != EPIPE) return written;
  return {};
}

}  // namespace unmoor::criu
