// Sessions as objects: one sequence's key/value cache on the server, with calls that number their
// steps and are retried safely.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/cpp/attnd_client.h"
#include "client/cpp/calls.h"
#include "client/cpp/retry.h"

namespace attn::client {

struct SessionOptions {
  std::string model = {};           // empty: a session without a model, for Attend alone
  uint64_t reserve_tokens = 0;      // memory to set aside now
  double time_to_live_seconds = 0;  // idle, until the server ends it; 0: the server's default
  DataType cache_dtype = attention::v1::DATA_TYPE_UNSPECIFIED;  // unset: the model's
  uint64_t rollback_tokens = 0;  // that can always be cut again on layers with windows; 0: 64
  RetryPolicy retry = {};        // of this session's calls and of its forks'
};

// Made by Client::OpenSession and by Fork; ends with Close or with the object. One thread at a time
// may use a session; any number of sessions may be used at once, and may outlive their Client.
//
// Retries. Every call that changes a layer's cache carries that layer's next number, its `step`. A
// failure of the transport (the connection lost, no answer in an attempt's time) and a refusal that
// waiting cures are followed by another attempt with the same number, within the call's deadline:
// the server executes the call once, whichever of the attempts reached it. OpenSession and Fork
// have no such number: a lost answer is not retried, and may leave a session behind that nobody
// knows and that expires; what the server refused for now is retried.
//
// Failed calls. A call that returned an error has not happened, except that its cut (truncate)
// stands. Where it may have been executed all the same (no attempt was answered in time), the next
// call on that layer first cuts what it may have appended. On a layer with a sliding window, that
// may be more than rollback_tokens: then the next call is OUT_OF_RANGE, as the proto says of cuts.
class Session {
 public:
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();  // closes, waits for the answer for a second at most, and does not retry

  const std::string& id() const;  // whoever has it can use the session: not for logs
  const std::string& model() const;
  const std::string& server_epoch() const;  // changes when the server starts anew, without sessions
  double time_to_live_seconds() const;

  // Tokens in a layer's cache, as the last successful call left it. Asks nobody.
  int64_t length(const Layer& layer) const;

  // hidden_states [1, q_len, hidden_size] and so on: this session is the batch's one row.
  absl::StatusOr<ForwardResult> Forward(ForwardCall call);
  absl::StatusOr<AttendResult> Attend(AttendCall call);

  // One call over several sessions of one client and model: row i of the call is the i-th session.
  // All of them are changed or none. The retry policy is the first one's.
  static absl::StatusOr<ForwardResult> ForwardBatch(absl::Span<Session* const> sessions,
                                                    ForwardCall call);
  static absl::StatusOr<AttendResult> AttendBatch(absl::Span<Session* const> sessions,
                                                  AttendCall call);

  // Sessions that share the first `length` tokens of every self-attention layer; unset: all.
  absl::StatusOr<std::vector<Session>> Fork(uint32_t count = 1,
                                            std::optional<int64_t> length = std::nullopt);

  // What the server knows of it: layers, lengths, bytes.
  absl::StatusOr<attention::v1::GetSessionResponse> Get();

  // NOT_FOUND where the session had expired. After an error too it is not closed again.
  absl::Status Close();

 private:
  friend class Client;
  struct State;
  explicit Session(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;  // null: moved from
};

}  // namespace attn::client
