// Strict reading of JSON objects for the manifest: each member once, of its type, within its
// bounds, and none that is not asked for. The first mistake is kept; later reads return empty
// values, so that callers read straight on and ask once at the end. Internal to src/image; one
// thread.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace unmoor {

class ParseContext {
 public:
  [[nodiscard]] bool ok() const { return !problem_; }
  [[nodiscard]] const std::string& problem() const { return *problem_; }
  void Fail(std::string problem) {
    if (!problem_) problem_ = std::move(problem);
  }

 private:
  std::optional<std::string> problem_;
};

class ObjectReader {
 public:
  // `where` names the object in messages, as in "tasks[3]"; empty for the whole.
  ObjectReader(ParseContext& context, const nlohmann::json& value, std::string where);

  [[nodiscard]] std::string Text(const char* key, size_t limit = 65536);
  [[nodiscard]] std::optional<std::string> TextOrNull(const char* key);
  // Whether an optional member is there.
  [[nodiscard]] bool Has(const char* key) const;
  [[nodiscard]] uint64_t Number(const char* key, uint64_t limit);
  // "0x…" or a fixed number of digits.
  [[nodiscard]] uint64_t Hex(const char* key, bool prefixed);
  // Always an array; an empty one after a mistake.
  [[nodiscard]] const nlohmann::json& Array(const char* key, size_t limit);
  [[nodiscard]] const nlohmann::json& Member(const char* key);
  [[nodiscard]] std::string Path(const std::string& key) const;
  void Fail(const std::string& key, const std::string& what);
  // Fails when a member is left that nobody asked for.
  void Close();

 private:
  ParseContext& context_;
  const nlohmann::json& object_;
  std::string where_;
  size_t read_ = 0;
};

}  // namespace unmoor
