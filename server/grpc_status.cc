#include "server/grpc_status.h"

#include <grpcpp/server_context.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "server/error_codec.h"

namespace attn::server {
grpc::Status ToGrpcStatus(const absl::Status& status, grpc::CallbackServerContext& context) {
  if (status.ok()) return grpc::Status::OK;
  const attention::v1::Error error = ToErrorMessage(status);
  context.AddTrailingMetadata("attention-error-bin", error.SerializeAsString());
  if (error.retry_delay_seconds() > 0.0) {
    context.AddTrailingMetadata(
        "grpc-retry-pushback-ms",
        absl::StrCat(std::llround(std::ceil(error.retry_delay_seconds() * 1e3))));
  }
  // Codes of absl and gRPC have the same numbers.
  return {static_cast<grpc::StatusCode>(status.code()), error.message()};
}

}  // namespace attn::server
