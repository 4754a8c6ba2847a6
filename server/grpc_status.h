// The one place where a status becomes a gRPC answer: code and text, the `Error` message as
// trailing metadata "attention-error-bin", and gRPC's own "grpc-retry-pushback-ms" where waiting
// helps.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace grpc {
class CallbackServerContext;
}

namespace attn::server {

grpc::Status ToGrpcStatus(const absl::Status& status, grpc::CallbackServerContext& context);

}  // namespace attn::server
