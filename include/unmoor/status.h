// Status and StatusOr<T>: how every function of this library reports a failure.
//
//   auto image = unmoor::PageImage::Open("/var/lib/heap/1");
//   if (!image.ok()) return Complain(image.status().message());
//   Use(*image);
//
// Nothing in this library throws across its headers. A message is one line that says what failed,
// on which file or address, and what to do. Plain values; safe as values are.
#pragma once

#include <cstdlib>
#include <optional>
#include <string>
#include <utility>

namespace unmoor {
inline namespace v1 {

enum class StatusCode {
  kOk = 0,
  kInvalidArgument = 1,  // the caller's mistake
  kNotFound = 2,         // no image there
  kDamaged = 3,          // an image that is incomplete, truncated or changed
  kUnsupported = 4,      // another format version, another machine, a kernel without the feature
  kBusy = 5,             // an address, a range or a directory is in use
  kNoMemory = 6,         // memory, address space or vm.max_map_count is exhausted
  kTimedOut = 7,
  kCancelled = 8,
  kSystem = 9,  // a system call failed: see errnum()
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message, int errnum = 0)
      : code_(code), errnum_(errnum), message_(std::move(message)) {}

  [[nodiscard]] bool ok() const { return code_ == StatusCode::kOk; }
  [[nodiscard]] StatusCode code() const { return code_; }
  // The errno behind the failure, 0 when there was none.
  [[nodiscard]] int errnum() const { return errnum_; }
  // One line without a full stop at its end; empty when ok.
  [[nodiscard]] const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  int errnum_ = 0;
  std::string message_;
};

// A T, or why there is none.
template <class T>
class [[nodiscard]] StatusOr {
 public:
  StatusOr(T value) : value_(std::move(value)) {}
  // REQUIRES: !status.ok()
  StatusOr(Status status) : status_(std::move(status)) {
    if (status_.ok()) std::abort();
  }

  [[nodiscard]] bool ok() const { return value_.has_value(); }
  [[nodiscard]] const Status& status() const { return status_; }

  // REQUIRES: ok(); aborts otherwise.
  [[nodiscard]] T& value() & { return Checked(); }
  [[nodiscard]] const T& value() const& { return const_cast<StatusOr*>(this)->Checked(); }
  [[nodiscard]] T&& value() && { return std::move(Checked()); }
  [[nodiscard]] T& operator*() & { return Checked(); }
  [[nodiscard]] const T& operator*() const& { return value(); }
  [[nodiscard]] T&& operator*() && { return std::move(Checked()); }
  [[nodiscard]] T* operator->() { return &Checked(); }
  [[nodiscard]] const T* operator->() const { return &value(); }

 private:
  [[nodiscard]] T& Checked() {
    if (!value_) std::abort();
    return *value_;
  }

  Status status_;
  std::optional<T> value_;
};

}  // namespace v1
}  // namespace unmoor
