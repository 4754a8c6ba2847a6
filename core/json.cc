#include "core/json.h"

#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

// Builds the document. Its own handler and not json::parse, which keeps the last of two equal names
// and nests without a limit (the destructor of a deep document is slow and hungry).
class DocumentBuilder {
 public:
  using json = nlohmann::json;

  bool null() { return Add(json(nullptr)); }
  bool boolean(bool value) { return Add(json(value)); }
  bool number_integer(json::number_integer_t value) { return Add(json(value)); }
  bool number_unsigned(json::number_unsigned_t value) { return Add(json(value)); }
  bool number_float(json::number_float_t value, const std::string&) { return Add(json(value)); }
  bool string(std::string& value) { return Add(json(std::move(value))); }
  bool binary(json::binary_t&) { return Fail("holds binary data"); }
  bool start_object(std::size_t) { return Open(json::object()); }
  bool start_array(std::size_t) {
    return open_.empty() ? Fail("is not an object") : Open(json::array());
  }
  bool end_object() { return Close(); }
  bool end_array() { return Close(); }

  bool key(std::string& name) {
    json& object = *open_.back();
    if (object.contains(name)) return Fail(absl::StrCat("has the name ", Quoted(name), " twice"));
    name_ = std::move(name);
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) {
    return Fail(absl::StrCat("is not JSON (at byte ", position, ")"));
  }

  const std::string& error() const { return error_; }
  json Take() { return std::move(root_); }

 private:
  bool Fail(std::string error) {
    error_ = std::move(error);
    return false;
  }

  bool Add(json value) {
    if (open_.empty()) return Fail("is not an object");
    Insert(std::move(value));
    return true;
  }

  // Pointers in open_ stay valid: a container takes no other element before its open child is
  // closed.
  json* Insert(json value) {
    json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[name_] = std::move(value));
  }

  bool Open(json container) {
    if (open_.size() >= kMaxJsonDepth) return Fail("is nested too deep");
    if (open_.empty()) {
      root_ = std::move(container);
      open_.push_back(&root_);
    } else {
      open_.push_back(Insert(std::move(container)));
    }
    return true;
  }

  bool Close() {
    open_.pop_back();
    return true;
  }

  json root_;
  std::vector<json*> open_;
  std::string name_;
  std::string error_;
};

std::string Shortened(std::string text) {
  constexpr std::size_t kLongest = 120;
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

}  // namespace

absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& text, const std::string& label,
                                               const std::string& reason) {
  DocumentBuilder builder;
  const char* problem = nullptr;
  if (HasNulByte(text.data(), text.size())) {
    problem = "is not JSON (it holds a NUL byte)";
  } else if (!nlohmann::json::sax_parse(text, &builder)) {
    problem = builder.error().c_str();
  }
  if (problem != nullptr) {
    return MakeError(absl::StatusCode::kInvalidArgument, reason, absl::StrCat(label, " ", problem),
                     {{"file", label}});
  }
  return builder.Take();
}

bool HasNulByte(const char* text, std::size_t bytes) {
  return bytes > 0 && std::memchr(text, 0, bytes) != nullptr;
}

std::string JsonExcerpt(const nlohmann::json& value) {
  return Shortened(value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace));
}

std::string Quoted(const std::string& text) { return JsonExcerpt(nlohmann::json(text)); }

}  // namespace attn
