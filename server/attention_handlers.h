// Attend and Forward without a wire: from a call to its answer. What can be refused is refused on
// the caller's thread, before anything is allocated; the rest happens on the device's driver.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "server/call_context.h"
#include "server/calls.h"
#include "server/server_state.h"

namespace attn::server {

using AttentionDone = std::function<void(absl::StatusOr<AttentionAnswer>)>;

// `done` is called exactly once, on this or another thread.
void HandleAttend(ServerState& state, AttendCall call, std::shared_ptr<CallContext> context,
                  AttentionDone done);
void HandleForward(ServerState& state, ForwardCall call, std::shared_ptr<CallContext> context,
                   AttentionDone done);

}  // namespace attn::server
