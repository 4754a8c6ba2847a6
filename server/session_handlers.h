// The session rpcs without a wire. Forking and closing wait for their session's earlier calls, as
// everything does that names it.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "attention/v1/admin.pb.h"
#include "attention/v1/attention.pb.h"
#include "server/call_context.h"
#include "server/calls.h"
#include "server/server_state.h"
#include "server/session_lanes.h"

namespace attn::server {

absl::Status HandleOpenSession(ServerState& state, const attention::v1::OpenSessionRequest& request,
                               attention::v1::OpenSessionResponse& response);
absl::Status HandleGetSession(ServerState& state, const attention::v1::GetSessionRequest& request,
                              attention::v1::GetSessionResponse& response);
absl::Status HandleListSessions(ServerState& state,
                                const attention::v1::ListSessionsRequest& request,
                                attention::v1::ListSessionsResponse& response);

// `done` is called exactly once, on this or another thread.
template <typename Response>
using ResponseDone = std::function<void(absl::StatusOr<Response>)>;
void HandleForkSession(ServerState& state, const attention::v1::ForkSessionRequest& request,
                       std::shared_ptr<CallContext> context,
                       ResponseDone<attention::v1::ForkSessionResponse> done);
void HandleCloseSession(ServerState& state, const attention::v1::CloseSessionRequest& request,
                        std::shared_ptr<CallContext> context,
                        ResponseDone<attention::v1::CloseSessionResponse> done);

// The sessions that a batch names, which are those of the model with this pool: otherwise
// NOT_FOUND, as for those that never were. INVALID_ARGUMENT for one that is named twice.
absl::StatusOr<std::vector<std::shared_ptr<Session>>> FindSessions(
    ServerState& state, const std::vector<std::string>& ids, const ManagerPool& pool);

}  // namespace attn::server
