#include "server/call_context.h"

#include "core/error.h"

namespace attn::server {

absl::Status CallContext::Wanted() const {
  // A deadline that passed is often reported as a cancellation first: the deadline is the cause.
  if (expired()) {
    return MakeError(absl::StatusCode::kDeadlineExceeded, "DEADLINE_EXCEEDED",
                     "the deadline has passed");
  }
  if (cancelled())
    return MakeError(absl::StatusCode::kCancelled, "CANCELLED", "the call was cancelled");
  return absl::OkStatus();
}

}  // namespace attn::server
