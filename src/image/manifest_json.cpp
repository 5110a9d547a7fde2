// See manifest_json.h.
#include "image/manifest_json.h"

#include <fmt/format.h>

#include <charconv>

namespace unmoor {
namespace {

const nlohmann::json kNull;
const nlohmann::json kEmptyArray = nlohmann::json::array();

}  // namespace

ObjectReader::ObjectReader(ParseContext& context, const nlohmann::json& value, std::string where)
    : context_(context), object_(value), where_(std::move(where)) {
  if (!object_.is_object()) context_.Fail(fmt::format("{} is not an object", Path("")));
}

std::string ObjectReader::Path(const std::string& key) const {
  if (where_.empty()) return key.empty() ? "the whole" : key;
  return key.empty() ? where_ : where_ + "." + key;
}

void ObjectReader::Fail(const std::string& key, const std::string& what) {
  context_.Fail(fmt::format("{} {}", Path(key), what));
}

const nlohmann::json& ObjectReader::Member(const char* key) {
  if (!context_.ok()) return kNull;
  const auto found = object_.find(key);
  if (found == object_.end()) {
    Fail(key, "is missing");
    return kNull;
  }
  ++read_;
  return *found;
}

bool ObjectReader::Has(const char* key) const {
  return context_.ok() && object_.contains(key);
}

std::string ObjectReader::Text(const char* key, size_t limit) {
  const nlohmann::json& value = Member(key);
  if (value.is_string() && value.get_ref<const std::string&>().size() <= limit) {
    return value.get<std::string>();
  }
  Fail(key, value.is_string() ? "is too long" : "is not a string");
  return {};
}

std::optional<std::string> ObjectReader::TextOrNull(const char* key) {
  const nlohmann::json& value = Member(key);
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_null()) Fail(key, "is neither a string nor null");
  return std::nullopt;
}

uint64_t ObjectReader::Number(const char* key, uint64_t limit) {
  const nlohmann::json& value = Member(key);
  if (!value.is_number_unsigned()) {
    Fail(key, "is not a whole number");
    return 0;
  }
  const auto number = value.get<uint64_t>();
  if (number <= limit) return number;
  Fail(key, fmt::format("is {}, more than {}", number, limit));
  return 0;
}

uint64_t ObjectReader::Hex(const char* key, bool prefixed) {
  std::string text = Text(key);
  if (!context_.ok()) return 0;
  if (prefixed && text.starts_with("0x")) {
    text.erase(0, 2);
  } else if (prefixed || text.size() != 16) {
    Fail(key, "is not a hexadecimal number");
    return 0;
  }
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number, 16);
  if (error != std::errc() || end != text.data() + text.size()) {
    Fail(key, "is not a hexadecimal number");
  }
  return number;
}

const nlohmann::json& ObjectReader::Array(const char* key, size_t limit) {
  const nlohmann::json& value = Member(key);
  if (value.is_array() && value.size() <= limit) return value;
  Fail(key, value.is_array() ? fmt::format("has more than {} elements", limit) : "is not an array");
  return kEmptyArray;
}

void ObjectReader::Close() {
  if (context_.ok() && read_ != object_.size()) Fail("", "has members this format does not know");
}

}  // namespace unmoor
