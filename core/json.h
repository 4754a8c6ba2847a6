// JSON from files that nobody vouches for: nesting is limited, names may occur only once, nothing
// recurses or throws.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"

namespace attn {

// Nesting that no config of a model comes near.
inline constexpr std::size_t kMaxJsonDepth = 64;

// Parses a text whose outermost value is an object. What is wrong with it comes back as
// INVALID_ARGUMENT with the reason that is given; `label` stands for the file in the message.
absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& text, const std::string& label,
                                               const std::string& reason);

// nlohmann's lexer takes a NUL byte for the end of the text and would accept anything after it:
// callers of its sax_parse look for one first.
bool HasNulByte(const char* text, std::size_t bytes);

// A value from a file as a message shows it: on one line, printable ASCII, shortened.
std::string JsonExcerpt(const nlohmann::json& value);
std::string Quoted(const std::string& text);

}  // namespace attn
