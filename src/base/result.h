// Result<T> and Error: the one story for failures.
//
// Every fallible function returns Result<T>. An Error says what failed, on which file or address,
// the errno, and what the reader can do. Two kinds travel in an Error: the user's mistake and the
// machine's failure; our own bugs do not, they abort through UNMOOR_CHECK with a clear line.
//
// Thread-safe as any value is. Nothing here throws across a public header.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

namespace unmoor {

enum class ErrorKind {
  kUser,     // a wrong argument, a bad image, a missing directory: exit code 2
  kMachine,  // a failed system call, a full disk, a failing criu: exit code 1
};

class Error {
 public:
  Error(ErrorKind kind, int errnum, std::string message)
      : kind_(kind), errnum_(errnum), message_(std::move(message)) {}

  [[nodiscard]] ErrorKind kind() const { return kind_; }
  // The errno behind the failure, 0 when there was none.
  [[nodiscard]] int errnum() const { return errnum_; }
  // One line, without a trailing full stop or newline.
  [[nodiscard]] const std::string& message() const { return message_; }

  // The same error with "prefix: " before its message.
  [[nodiscard]] Error WithContext(std::string_view prefix) const {
    return {kind_, errnum_, fmt::format("{}: {}", prefix, message_)};
  }

 private:
  ErrorKind kind_;
  int errnum_;
  std::string message_;
};

template <class T = void>
using Result = tl::expected<T, Error>;

using Failure = tl::unexpected<Error>;

// "what: strerror(errnum)". `errnum` is taken by value so that errno survives formatting.
[[nodiscard]] Failure SystemError(int errnum, std::string_view what);

template <class... Args>
[[nodiscard]] Failure UserError(fmt::format_string<Args...> format, Args&&... args) {
  return Failure(Error(ErrorKind::kUser, 0, fmt::format(format, std::forward<Args>(args)...)));
}

template <class... Args>
[[nodiscard]] Failure MachineError(fmt::format_string<Args...> format, Args&&... args) {
  return Failure(Error(ErrorKind::kMachine, 0, fmt::format(format, std::forward<Args>(args)...)));
}

namespace internal {
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition);
}  // namespace internal

}  // namespace unmoor

// Our bug, not the user's: prints one line and aborts.
#define UNMOOR_CHECK(condition) \
  ((condition) ? (void)0 : ::unmoor::internal::CheckFailed(__FILE__, __LINE__, #condition))

#define UNMOOR_CONCAT_INNER(a, b) a##b
#define UNMOOR_CONCAT(a, b) UNMOOR_CONCAT_INNER(a, b)

// Returns the error of a Result<void> (or of a Result whose value is not wanted).
#define UNMOOR_TRY(expression)                                    \
  do {                                                            \
    if (auto unmoor_result = (expression); !unmoor_result) {      \
      return ::unmoor::Failure(std::move(unmoor_result).error()); \
    }                                                             \
  } while (false)

// UNMOOR_ASSIGN(auto fd, OpenFile(path)): declares or assigns, or returns the error.
#define UNMOOR_ASSIGN(target, expression) \
  UNMOOR_ASSIGN_INNER(UNMOOR_CONCAT(unmoor_value_, __LINE__), target, expression)
#define UNMOOR_ASSIGN_INNER(temporary, target, expression)  \
  auto temporary = (expression);                            \
  if (!temporary) {                                         \
    return ::unmoor::Failure(std::move(temporary).error()); \
  }                                                         \
  target = std::move(temporary).value()
