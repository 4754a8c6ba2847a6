#include "core/error.h"

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace attn {
namespace {

constexpr char kReasonUrl[] = "attnd/reason";
constexpr char kRetryUrl[] = "attnd/retry_delay";
constexpr char kDetailPrefix[] = "attnd/detail/";

}  // namespace

absl::Status MakeError(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                       ErrorDetails details) {
  absl::Status status(code, message);
  status.SetPayload(kReasonUrl, absl::Cord(reason));
  for (const auto& [key, value] : details) {
    status.SetPayload(absl::StrCat(kDetailPrefix, key), absl::Cord(value));
  }
  return status;
}

absl::Status InvalidField(absl::string_view field, absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, "INVALID_FIELD", message,
                   {{"field", std::string(field)}});
}

std::string ErrorReason(const absl::Status& status) {
  const auto payload = status.GetPayload(kReasonUrl);
  return payload ? std::string(*payload) : std::string();
}

std::map<std::string, std::string> ErrorDetailsOf(const absl::Status& status) {
  std::map<std::string, std::string> details;
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& value) {
    const absl::string_view prefix = kDetailPrefix;
    if (url.substr(0, prefix.size()) == prefix) {
      details[std::string(url.substr(prefix.size()))] = std::string(value);
    }
  });
  return details;
}

absl::Status OutOfMemory() {
  return MakeError(absl::StatusCode::kResourceExhausted, "OUT_OF_MEMORY",
                   "there is not enough memory for this call");
}

void SetRetryDelay(absl::Status& status, double seconds) {
  status.SetPayload(kRetryUrl, absl::Cord(absl::StrCat(seconds)));
}

double RetryDelay(const absl::Status& status) {
  const auto payload = status.GetPayload(kRetryUrl);
  double seconds = 0.0;
  if (payload && !absl::SimpleAtod(std::string(*payload), &seconds)) return 0.0;
  return seconds;
}

}  // namespace attn
