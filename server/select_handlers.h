// SelectAttention without a wire: what "auto" would choose, and why.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "attention/v1/admin.pb.h"
#include "core/hosted_model.h"
#include "server/server_state.h"

namespace attn::server {

// An execution of `layer` with the message's extents and demands, as the data plane would describe
// it: the queries stand at the last keys. `model_cache_dtype` is that of its sessions. Fails with
// INVALID_ARGUMENT naming the field.
absl::StatusOr<AttentionShape> ShapeOfMessage(const attention::v1::AttentionShape& message,
                                              const HostedLayer& layer, DType model_cache_dtype,
                                              std::int64_t max_tokens);

absl::Status HandleSelectAttention(ServerState& state,
                                   const attention::v1::SelectAttentionRequest& request,
                                   attention::v1::SelectAttentionResponse& response);

}  // namespace attn::server
