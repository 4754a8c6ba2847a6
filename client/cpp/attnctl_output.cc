#include <google/protobuf/util/json_util.h>
#include <google/protobuf/wrappers.pb.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cpp/attnctl.h"
#include "client/cpp/table.h"

namespace attn::client {
namespace {

constexpr char kUsagePayload[] = "attnctl/usage";

std::string MessageJson(const google::protobuf::Message& message, bool whitespace) {
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = whitespace;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string json;
  // Fails for text that is not UTF-8 only, which protobuf's own parser has refused by now.
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  return status.ok() ? json : "null";
}

}  // namespace

absl::Status UsageError(const std::string& message) {
  absl::Status status = absl::InvalidArgumentError(message);
  status.SetPayload(kUsagePayload, absl::Cord());
  return status;
}

bool IsUsageError(const absl::Status& status) {
  return status.GetPayload(kUsagePayload).has_value();
}

std::string ToJson(const google::protobuf::Message& message) { return MessageJson(message, true); }

std::string JsonString(const std::string& text) {
  google::protobuf::StringValue value;
  value.set_value(text);
  return MessageJson(value, false);
}

absl::Status Print(const std::string& text) {
  const bool newline = !text.empty() && text.back() != '\n';
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (newline) std::fputc('\n', stdout);
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    return absl::DataLossError("standard output cannot be written");
  }
  return absl::OkStatus();
}

std::string ErrorText(const absl::Status& status) {
  const ClientError error = ErrorOf(status);
  std::vector<std::string> more;
  if (!error.reason.empty()) more.push_back(error.reason);
  const std::string details = absl::StrJoin(error.details, ", ", absl::PairFormatter("="));
  if (!details.empty()) more.push_back(details);
  if (error.retry_delay_seconds > 0) {
    more.push_back(absl::StrCat("try again in ", SecondsText(error.retry_delay_seconds)));
  }
  std::string text = absl::StrCat(absl::StatusCodeToString(error.code), ": ", error.message);
  if (!more.empty()) absl::StrAppend(&text, " (", absl::StrJoin(more, "; "), ")");
  std::replace_if(
      text.begin(), text.end(),
      [](char c) { return absl::ascii_iscntrl(static_cast<unsigned char>(c)); }, ' ');
  return text;
}

std::string EnumText(const std::string& name, const std::string& prefix) {
  const std::string rest = absl::StartsWith(name, prefix) ? name.substr(prefix.size()) : name;
  return rest == "UNSPECIFIED" ? "-" : absl::AsciiStrToLower(rest);
}

}  // namespace attn::client
