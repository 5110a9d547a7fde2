// See userfaultfd.h.
#include "os/userfaultfd.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>

#include "os/kernel_abi.h"

namespace unmoor {
namespace {

// What an ioctl that places pages says: how many bytes (negative: an errno), or only an errno.
Result<UffdPlaced> Understand(int error, int64_t placed, Bytes length) {
  using Stop = UffdPlaced::Stop;
  if (error == 0) return UffdPlaced{Stop::kNone, length};
  if (placed > 0) return UffdPlaced{Stop::kNone, Bytes(static_cast<uint64_t>(placed))};
  switch (error) {
    case EEXIST:
      return UffdPlaced{Stop::kPresent, {}};
    case ENOENT:
      return UffdPlaced{Stop::kNotThere, {}};
    case EAGAIN:
      return UffdPlaced{Stop::kChanging, {}};
    case ENOMEM:
      return UffdPlaced{Stop::kOutOfMemory, {}};
    case ESRCH:
    case EBADF:  // let go of already
      return UffdPlaced{Stop::kGone, {}};
    default:
      return SystemError(error, "userfaultfd refuses pages");
  }
}

// Repeats a call that places pages until it has placed all or one stops it.
template <class Place>
Result<UffdPlaced> PlaceAll(Bytes length, const Place& place) {
  Bytes done;
  while (done < length) {
    UNMOOR_ASSIGN(UffdPlaced part, place(done));
    done += part.bytes;
    if (part.stop != UffdPlaced::Stop::kNone) return UffdPlaced{part.stop, done};
  }
  return UffdPlaced{UffdPlaced::Stop::kNone, done};
}

}  // namespace

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
    case UFFD_EVENT_PAGEFAULT: {
      const Vaddr page(AlignDown(message.arg.pagefault.address, kPageSize));
      event.kind = UffdEvent::Kind::kFault;
      event.range = {page, page + Bytes(kPageSize)};
      break;
    }
    default:
      break;
  }
  return std::optional<UffdEvent>(std::move(event));
}

Result<UffdPlaced> UffdCopy(int uffd, Vaddr to, std::span<const std::byte> pages) {
  const Bytes length(pages.size());
  return PlaceAll(length, [&](Bytes done) {
    uffdio_copy argument{};
    argument.dst = (to + done).value;
    // SAFETY: an address given to the kernel, which reads it.
    argument.src = reinterpret_cast<uint64_t>(pages.data() + done.value);
    argument.len = (length - done).value;
    const int error = ::ioctl(uffd, UFFDIO_COPY, &argument) == 0 ? 0 : errno;
    return Understand(error, argument.copy, length - done);
  });
}

Result<UffdPlaced> UffdZero(int uffd, VaddrRange range) {
  return PlaceAll(range.size(), [&](Bytes done) {
    uffdio_zeropage argument{};
    argument.range = {(range.begin + done).value, (range.size() - done).value};
    const int error = ::ioctl(uffd, UFFDIO_ZEROPAGE, &argument) == 0 ? 0 : errno;
    return Understand(error, argument.zeropage, range.size() - done);
  });
}

bool UffdIsChanging(int uffd) {
  // The kernel looks for changes before it looks at what is asked for, which here is nothing.
  uffdio_copy nothing{};
  return ::ioctl(uffd, UFFDIO_COPY, &nothing) != 0 && errno == EAGAIN;
}

void UffdWake(int uffd, VaddrRange range) {
  uffdio_range argument{range.begin.value, range.size().value};
  (void)::ioctl(uffd, UFFDIO_WAKE, &argument);
}

void UffdWakeAll(int uffd) {
  constexpr Vaddr kLowest(uint64_t{64} << 10), kEnd((uint64_t{1} << 47) - kPageSize);
  UffdWake(uffd, {kLowest, kEnd});
}

}  // namespace unmoor
