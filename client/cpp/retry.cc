#include "client/cpp/retry.h"

#include <algorithm>
#include <cmath>

#include "client/cpp/attnd_client.h"

namespace attn::client {
namespace {

bool WorthRepeating(Repeatable repeatable, const ClientError& error) {
  if (repeatable == Repeatable::kNothing) return false;
  if (!error.answered && repeatable != Repeatable::kAll) return false;
  switch (error.code) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:  // of the attempt: the call's own is the caller's
                                               // check
      return true;
    case absl::StatusCode::kResourceExhausted:
      return error.retry_delay_seconds > 0;
    case absl::StatusCode::kInternal:  // how gRPC reports some of the ways a stream breaks
    case absl::StatusCode::kUnknown:
      return !error.answered;
    default:
      return false;
  }
}

}  // namespace

std::optional<double> RetryDelay(const RetryPolicy& policy, Repeatable repeatable,
                                 const absl::Status& status, int attempt, double fraction) {
  const ClientError error = ErrorOf(status);
  if (attempt >= policy.max_attempts || !WorthRepeating(repeatable, error)) return std::nullopt;
  const double backoff =
      policy.initial_backoff_seconds * std::pow(policy.backoff_multiplier, attempt - 1);
  const double jittered = std::min(backoff, policy.max_backoff_seconds) * (1 - fraction / 4);
  return std::max({jittered, error.retry_delay_seconds, 0.0});
}

}  // namespace attn::client
