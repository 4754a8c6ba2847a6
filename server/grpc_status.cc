#include "server/grpc_status.h"

#include <grpcpp/server_context.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "attention/v1/attention.pb.h"
#include "core/error.h"

namespace attn::server {
namespace {

// Texts may quote what a caller sent; metadata beyond 8 KiB would end the call.
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

grpc::Status ToGrpcStatus(const absl::Status& status, grpc::CallbackServerContext& context) {
  if (status.ok()) return grpc::Status::OK;
  const std::string text = Cut(std::string(status.message()), kMaxTextBytes);
  attention::v1::Error error;
  error.set_code(static_cast<int>(status.code()));
  error.set_message(text);
  error.set_retry_delay_seconds(RetryDelay(status));
  error.set_reason(ErrorReason(status));
  for (const auto& [key, value] : ErrorDetailsOf(status)) {
    (*error.mutable_details())[key] = Cut(value, kMaxDetailBytes);
  }
  context.AddTrailingMetadata("attention-error-bin", error.SerializeAsString());
  if (error.retry_delay_seconds() > 0.0) {
    context.AddTrailingMetadata(
        "grpc-retry-pushback-ms",
        absl::StrCat(std::llround(std::ceil(error.retry_delay_seconds() * 1e3))));
  }
  // Codes of absl and gRPC have the same numbers.
  return {static_cast<grpc::StatusCode>(status.code()), text};
}

}  // namespace attn::server
