// Errors that programs can read. A status made here carries, besides its code and text, a stable
// UPPER_SNAKE_CASE reason and details by name; the server puts them into the `Error` message of the
// API. Text and details never hold addresses, paths that the caller did not send, or secrets.
#pragma once

#include <initializer_list>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace attn {

using ErrorDetails = std::initializer_list<std::pair<const char*, std::string>>;

absl::Status MakeError(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                       ErrorDetails details = {});

// The caller's input breaks a rule: INVALID_ARGUMENT with details["field"] = field. The message
// gives field, value and rule: `key has 3 heads, which does not divide query's 8`.
absl::Status InvalidField(absl::string_view field, absl::string_view message);

// The reason of a status that MakeError made; "" for others.
std::string ErrorReason(const absl::Status& status);
std::map<std::string, std::string> ErrorDetailsOf(const absl::Status& status);

// Seconds after which a retry may succeed; 0: waiting does not help. Kept as a payload beside the
// reason.
void SetRetryDelay(absl::Status& status, double seconds);
double RetryDelay(const absl::Status& status);

// RESOURCE_EXHAUSTED (reason OUT_OF_MEMORY).
absl::Status OutOfMemory();

// Runs `body`, which returns a status or a StatusOr: memory that can't be had is a failed call, not
// the end of the process.
template <typename Body>
auto GuardMemory(Body body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return OutOfMemory();
  } catch (const std::length_error&) {
    return OutOfMemory();
  }
}

}  // namespace attn

// Returns from the enclosing function where `expr` is not OK.
#define ATTN_RETURN_IF_ERROR(expr)             \
  do {                                         \
    absl::Status attn_status = (expr);         \
    if (!attn_status.ok()) return attn_status; \
  } while (false)

#define ATTN_CONCAT_INNER(a, b) a##b
#define ATTN_CONCAT(a, b) ATTN_CONCAT_INNER(a, b)
// `lhs = value of rexpr` (a StatusOr), or returns its status.
#define ATTN_ASSIGN_OR_RETURN(lhs, rexpr) \
  ATTN_ASSIGN_OR_RETURN_INNER(ATTN_CONCAT(attn_status_or_, __LINE__), lhs, rexpr)
#define ATTN_ASSIGN_OR_RETURN_INNER(tmp_name, lhs, rexpr) \
  auto tmp_name = (rexpr);                                \
  if (!tmp_name.ok()) return tmp_name.status();           \
  lhs = std::move(tmp_name).value()
