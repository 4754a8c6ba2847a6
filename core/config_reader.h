// Typed access to a model's config.json. Every value is checked for its type and range when it is
// read, and the reader remembers which fields were, so that a family can refuse what it did not
// understand.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace attn {

// A view of one JSON object; the document outlives it. null counts as absent, as in Hugging Face
// configs. Wrong types and ranges are INVALID_ARGUMENT (reason BAD_MODEL_DIRECTORY, details
// "field") with the field, its value and the rule.
class ConfigReader {
 public:
  // `path` precedes field names in messages: "" or, for a nested object, "text_config.".
  explicit ConfigReader(const nlohmann::json* object, std::string path = "");

  bool Has(const std::string& name) const;
  // Whether the field is there at all, null or not: where a class's default is not null, the two
  // differ.
  bool Mentions(const std::string& name) const;
  std::vector<std::string> Names() const;

  // Whole numbers alone: neither 12.0 nor "12".
  absl::StatusOr<std::uint32_t> RequiredInt(const std::string& name, std::uint32_t min,
                                            std::uint32_t max);
  absl::StatusOr<std::uint32_t> IntOr(const std::string& name, std::uint32_t fallback,
                                      std::uint32_t min, std::uint32_t max);
  absl::StatusOr<double> NumberOr(const std::string& name, double fallback, double min, double max);
  absl::StatusOr<bool> BoolOr(const std::string& name, bool fallback);
  absl::StatusOr<std::string> RequiredString(const std::string& name);
  absl::StatusOr<std::string> StringOr(const std::string& name, const std::string& fallback);
  absl::StatusOr<ConfigReader> RequiredObject(const std::string& name);
  // Arrays of exactly `count` elements; strings also of any number up to 65,536.
  absl::StatusOr<std::vector<double>> RequiredNumbers(const std::string& name, std::size_t count,
                                                      double min, double max);
  absl::StatusOr<std::vector<std::string>> RequiredStrings(
      const std::string& name, std::optional<std::size_t> count = std::nullopt);

  // Marks a field that does not matter to attention for this family, although others give it a
  // meaning.
  void Ignore(const std::string& name) { read_.insert(name); }

  // UNIMPLEMENTED (reason UNSUPPORTED_MODEL, details "field" and "value") with the field and its
  // value.
  absl::Status Unsupported(const std::string& name) const;
  // Unsupported() for the first of `names` that is in the config, is on (not null, false or empty),
  // and was neither read nor ignored.
  absl::Status RefuseUnread(std::span<const char* const> names) const;

  // INVALID_ARGUMENT about a field: `rule` completes "config.json: hidden_size is 7, ".
  absl::Status Bad(const std::string& name, const std::string& rule) const;
  absl::Status Missing(const std::string& name) const;

 private:
  // Null where the field is absent.
  const nlohmann::json* Find(const std::string& name) const;
  const nlohmann::json* Read(const std::string& name);

  const nlohmann::json* object_;
  std::string path_;
  std::set<std::string> read_;
};

}  // namespace attn
