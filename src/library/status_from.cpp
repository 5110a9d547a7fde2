// See status_from.h.
#include "library/status_from.h"

#include <cerrno>

namespace unmoor {
inline namespace v1 {
namespace {

StatusCode CodeOf(const Error& error, StatusCode user) {
  switch (error.errnum()) {
    case ENOMEM:
      return StatusCode::kNoMemory;
    case EOPNOTSUPP:
      return StatusCode::kUnsupported;
    case 0:
      return error.kind() == ErrorKind::kUser ? user : StatusCode::kSystem;
    default:
      return StatusCode::kSystem;
  }
}

}  // namespace

Status StatusFrom(const Error& error, StatusCode user) {
  return {CodeOf(error, user), error.message(), error.errnum()};
}

}  // namespace v1
}  // namespace unmoor
