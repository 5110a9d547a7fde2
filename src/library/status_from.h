// From the rooms' Error to the public Status.
//
// An Error knows only whose fault it is; which StatusCode that is, the caller knows better: what is
// the user's fault in an argument is damage in a file. errnum decides where there is one.
#pragma once

#include "base/result.h"
#include "unmoor/status.h"

namespace unmoor {
inline namespace v1 {

// `user` is the code for ErrorKind::kUser without an errno of its own.
[[nodiscard]] Status StatusFrom(const Error& error, StatusCode user = StatusCode::kInvalidArgument);

template <class... Args>
[[nodiscard]] Status MakeStatus(StatusCode code, fmt::format_string<Args...> format,
                                Args&&... args) {
  return {code, fmt::format(format, std::forward<Args>(args)...)};
}

}  // namespace v1
}  // namespace unmoor

// Like UNMOOR_TRY and UNMOOR_ASSIGN, in a function that returns Status or StatusOr.
#define UNMOOR_STATUS_TRY(expression)                        \
  do {                                                       \
    if (auto unmoor_result = (expression); !unmoor_result) { \
      return ::unmoor::StatusFrom(unmoor_result.error());    \
    }                                                        \
  } while (false)

#define UNMOOR_STATUS_ASSIGN(target, expression) \
  UNMOOR_STATUS_ASSIGN_INNER(UNMOOR_CONCAT(unmoor_value_, __LINE__), target, expression)
#define UNMOOR_STATUS_ASSIGN_INNER(temporary, target, expression) \
  auto temporary = (expression);                                  \
  if (!temporary) return ::unmoor::StatusFrom(temporary.error()); \
  target = std::move(temporary).value()
