// See userfaultfd.h.
#include "os/userfaultfd.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>

#include "os/kernel_abi.h"

namespace unmoor {

Result<> UffdHandshake(int uffd, uint64_t features) {
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = features;
  if (::ioctl(uffd, UFFDIO_API, &api) != 0) {
    return SystemError(errno, "userfaultfd refuses the features needed (kernel 6.8 has them)");
  }
  return {};
}

uint64_t UffdEventFeatures() {
  return UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |
         UFFD_FEATURE_EVENT_UNMAP | kernel::kUffdFeatureWpAsync;
}

Result<> UffdRegister(int uffd, VaddrRange range, UffdMode mode) {
  uffdio_register argument{};
  argument.range = {range.begin.value, range.size().value};
  argument.mode =
      mode == UffdMode::kMissing ? UFFDIO_REGISTER_MODE_MISSING : UFFDIO_REGISTER_MODE_WP;
  if (::ioctl(uffd, UFFDIO_REGISTER, &argument) != 0) {
    return SystemError(errno, fmt::format("cannot register {} with userfaultfd", range));
  }
  return {};
}

Result<> UffdUnregister(int uffd, VaddrRange range) {
  uffdio_range argument{range.begin.value, range.size().value};
  if (::ioctl(uffd, UFFDIO_UNREGISTER, &argument) != 0) {
    return SystemError(errno, fmt::format("cannot unregister {} from userfaultfd", range));
  }
  return {};
}

Result<std::optional<UffdEvent>> ReadUffdEvent(int uffd) {
  uffd_msg message{};
  const ssize_t n = ::read(uffd, &message, sizeof(message));
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return std::optional<UffdEvent>();
  if (n != sizeof(message)) return SystemError(n < 0 ? errno : EIO, "cannot read userfaultfd");
  UffdEvent event;
  switch (message.event) {
    case UFFD_EVENT_FORK:
      event.kind = UffdEvent::Kind::kFork;
      event.child = Fd(static_cast<int>(message.arg.fork.ufd));
      break;
    case UFFD_EVENT_REMAP:
      event.kind = UffdEvent::Kind::kRemap;
      event.range = {Vaddr(message.arg.remap.from),
                     Vaddr(message.arg.remap.from + message.arg.remap.len)};
      event.to = Vaddr(message.arg.remap.to);
      break;
    case UFFD_EVENT_REMOVE:
    case UFFD_EVENT_UNMAP:
      event.kind =
          message.event == UFFD_EVENT_REMOVE ? UffdEvent::Kind::kRemove : UffdEvent::Kind::kUnmap;
      event.range = {Vaddr(message.arg.remove.start), Vaddr(message.arg.remove.end)};
      break;
    default:
      break;
  }
  return std::optional<UffdEvent>(std::move(event));
}

}  // namespace unmoor
