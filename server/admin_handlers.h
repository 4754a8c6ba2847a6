// The control plane without a wire: messages in, messages out.
#pragma once

#include <functional>

#include "absl/status/status.h"
#include "attention/v1/admin.pb.h"
#include "attention/v1/attention.pb.h"
#include "server/server_state.h"

namespace attn::server {

absl::Status HandleListModels(ServerState& state, const attention::v1::ListModelsRequest& request,
                              attention::v1::ListModelsResponse& response);
// Slow: on the background executor.
absl::Status HandleLoadModel(ServerState& state, const attention::v1::LoadModelRequest& request,
                             attention::v1::LoadModelResponse& response);
absl::Status HandleUnloadModel(ServerState& state, const attention::v1::UnloadModelRequest& request,
                               attention::v1::UnloadModelResponse& response);
absl::Status HandleSwitchAttention(ServerState& state,
                                   const attention::v1::SwitchAttentionRequest& request,
                                   attention::v1::SwitchAttentionResponse& response);
absl::Status HandleListImplementations(ServerState& state,
                                       const attention::v1::ListImplementationsRequest& request,
                                       attention::v1::ListImplementationsResponse& response);
absl::Status HandleGetHardware(ServerState& state, const attention::v1::GetHardwareRequest& request,
                               attention::v1::GetHardwareResponse& response);
absl::Status HandleGetServerInfo(ServerState& state,
                                 const attention::v1::GetServerInfoRequest& request,
                                 attention::v1::GetServerInfoResponse& response);

}  // namespace attn::server
