#include "core/config_reader.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/json.h"

namespace attn {
namespace {

constexpr char kBadDirectory[] = "BAD_MODEL_DIRECTORY";
constexpr std::size_t kMaxStrings = 65536;

bool IsOff(const nlohmann::json& value) {
  if (value.is_boolean()) return !value.get<bool>();
  return value.is_null() || ((value.is_structured() || value.is_string()) && value.size() == 0) ||
         (value.is_string() && value.get_ref<const std::string&>().empty());
}

}  // namespace

ConfigReader::ConfigReader(const nlohmann::json* object, std::string path)
    : object_(object), path_(std::move(path)) {}

const nlohmann::json* ConfigReader::Find(const std::string& name) const {
  const auto found = object_->find(name);
  return found == object_->end() || found->is_null() ? nullptr : &*found;
}

const nlohmann::json* ConfigReader::Read(const std::string& name) {
  read_.insert(name);
  return Find(name);
}

bool ConfigReader::Mentions(const std::string& name) const { return object_->contains(name); }

std::vector<std::string> ConfigReader::Names() const {
  std::vector<std::string> names;
  for (const auto& [name, value] : object_->items()) names.push_back(name);
  return names;
}

bool ConfigReader::Has(const std::string& name) const { return Find(name) != nullptr; }

absl::Status ConfigReader::Bad(const std::string& name, const std::string& rule) const {
  const nlohmann::json* value = Find(name);
  return MakeError(absl::StatusCode::kInvalidArgument, kBadDirectory,
                   absl::StrCat("config.json: ", path_, name, " is ",
                                value == nullptr ? "null" : JsonExcerpt(*value), ", ", rule),
                   {{"field", path_ + name}});
}

absl::Status ConfigReader::Missing(const std::string& name) const {
  return MakeError(absl::StatusCode::kInvalidArgument, kBadDirectory,
                   absl::StrCat("config.json: ", path_, name, " is missing"),
                   {{"field", path_ + name}});
}

absl::Status ConfigReader::Unsupported(const std::string& name) const {
  const nlohmann::json* value = Find(name);
  const std::string shown = value == nullptr ? "null" : JsonExcerpt(*value);
  return MakeError(absl::StatusCode::kUnimplemented, "UNSUPPORTED_MODEL",
                   absl::StrCat("config.json: ", path_, name, " is ", shown,
                                ", which is not supported for this model"),
                   {{"field", path_ + name}, {"value", shown}});
}

absl::Status ConfigReader::RefuseUnread(std::span<const char* const> names) const {
  for (const char* name : names) {
    const nlohmann::json* value = Find(name);
    if (value != nullptr && !IsOff(*value) && !read_.contains(name)) return Unsupported(name);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::uint32_t> ConfigReader::RequiredInt(const std::string& name, std::uint32_t min,
                                                        std::uint32_t max) {
  const nlohmann::json* value = Read(name);
  if (value == nullptr) return Missing(name);
  if (value->is_number_unsigned()) {
    const auto number = value->get<std::uint64_t>();
    if (number >= min && number <= max) return static_cast<std::uint32_t>(number);
  }
  return Bad(name, absl::StrCat("which is not a whole number from ", min, " to ", max));
}

absl::StatusOr<std::uint32_t> ConfigReader::IntOr(const std::string& name, std::uint32_t fallback,
                                                  std::uint32_t min, std::uint32_t max) {
  if (Read(name) == nullptr) return fallback;
  return RequiredInt(name, min, max);
}

absl::StatusOr<double> ConfigReader::NumberOr(const std::string& name, double fallback, double min,
                                              double max) {
  const nlohmann::json* value = Read(name);
  if (value == nullptr) return fallback;
  if (value->is_number()) {
    const auto number = value->get<double>();
    if (number >= min && number <= max) return number;
  }
  return Bad(name, absl::StrCat("which is not a number from ", min, " to ", max));
}

absl::StatusOr<bool> ConfigReader::BoolOr(const std::string& name, bool fallback) {
  const nlohmann::json* value = Read(name);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return Bad(name, "which is neither true nor false");
  return value->get<bool>();
}

absl::StatusOr<std::string> ConfigReader::RequiredString(const std::string& name) {
  const nlohmann::json* value = Read(name);
  if (value == nullptr) return Missing(name);
  if (!value->is_string()) return Bad(name, "which is not a string");
  return value->get<std::string>();
}

absl::StatusOr<std::string> ConfigReader::StringOr(const std::string& name,
                                                   const std::string& fallback) {
  if (Read(name) == nullptr) return fallback;
  return RequiredString(name);
}

absl::StatusOr<ConfigReader> ConfigReader::RequiredObject(const std::string& name) {
  const nlohmann::json* value = Read(name);
  if (value == nullptr) return Missing(name);
  if (!value->is_object()) return Bad(name, "which is not an object");
  return ConfigReader(value, absl::StrCat(path_, name, "."));
}

absl::StatusOr<std::vector<double>> ConfigReader::RequiredNumbers(const std::string& name,
                                                                  std::size_t count, double min,
                                                                  double max) {
  const nlohmann::json* value = Read(name);
  if (value == nullptr) return Missing(name);
  if (!value->is_array() || value->size() != count) {
    return Bad(name, absl::StrCat("which is not an array of ", count, " numbers"));
  }
  std::vector<double> numbers;
  for (const nlohmann::json& element : *value) {
    const double number = element.is_number() ? element.get<double>() : std::nan("");
    if (!(number >= min && number <= max)) {
      return Bad(name, absl::StrCat("which holds what is not a number from ", min, " to ", max));
    }
    numbers.push_back(number);
  }
  return numbers;
}

absl::StatusOr<std::vector<std::string>> ConfigReader::RequiredStrings(
    const std::string& name, std::optional<std::size_t> count) {
  const nlohmann::json* value = Read(name);
  if (value == nullptr) return Missing(name);
  if (!value->is_array() || value->size() > kMaxStrings) {
    return Bad(name, "which is not an array of strings");
  }
  if (count && value->size() != *count) {
    return Bad(name,
               absl::StrCat("which has ", value->size(), " elements, but must have ", *count));
  }
  std::vector<std::string> strings;
  for (const nlohmann::json& element : *value) {
    if (!element.is_string()) return Bad(name, "which is not an array of strings");
    strings.push_back(element.get<std::string>());
  }
  return strings;
}

}  // namespace attn
