// Which failed calls are worth another attempt, and when.
#pragma once

#include <optional>

#include "absl/status/status.h"

namespace attn::client {

// Of one call of a session, within its deadline.
struct RetryPolicy {
  int max_attempts = 6;  // the first included; 1: no retries
  // Before attempt n + 1: initial * multiplier^(n-1), at most max, less up to a quarter of itself
  // at random, so that callers that failed together do not come back together; and never less than
  // the delay that the server asked for.
  double initial_backoff_seconds = 0.1;
  double backoff_multiplier = 2;
  double max_backoff_seconds = 2;
  // An attempt that has no answer for so long is given up and made again: for connections that lose
  // an answer without breaking. Must exceed the longest execution. 0: an attempt may take all of
  // the call's time.
  double attempt_timeout_seconds = 0;
};

// What may be executed twice without harm.
enum class Repeatable {
  kNothing,
  kRefusals,  // only what the server says it has not done
  kAll,       // also what it may have done: the call carries a step, or changes nothing
};

// Seconds to wait before the attempt that follows `attempt` (from 1), which failed with `status`;
// nullopt where none should follow. `fraction` in [0, 1) is where in the random quarter.
std::optional<double> RetryDelay(const RetryPolicy& policy, Repeatable repeatable,
                                 const absl::Status& status, int attempt, double fraction);

}  // namespace attn::client
