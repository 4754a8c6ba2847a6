#include "server/error_codec.h"

#include <string>

#include "core/error.h"

namespace attn::server {
namespace {

// Metadata beyond 8 KiB would end the call.
constexpr std::size_t kMaxTextBytes = 1024;
constexpr std::size_t kMaxDetailBytes = 256;

// Cut at the bound, without half a UTF-8 character at the end; bytes that are no UTF-8 were refused
// when parsing.
std::string Cut(std::string text, std::size_t bound) {
  if (text.size() <= bound) return text;
  while (bound > 0 && (static_cast<unsigned char>(text[bound]) & 0xC0) == 0x80) --bound;
  text.resize(bound);
  return text + "...";
}

}  // namespace

attention::v1::Error ToErrorMessage(const absl::Status& status) {
  attention::v1::Error error;
  error.set_code(static_cast<int>(status.code()));
  error.set_message(Cut(std::string(status.message()), kMaxTextBytes));
  error.set_retry_delay_seconds(RetryDelay(status));
  error.set_reason(ErrorReason(status));
  for (const auto& [key, value] : ErrorDetailsOf(status)) {
    (*error.mutable_details())[key] = Cut(value, kMaxDetailBytes);
  }
  return error;
}

}  // namespace attn::server
