// The envelopes of a stream's messages. Only they are looked at here: a request's own bytes stay
// where they are, and are decoded as those of a unary call.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "server/answer.h"
#include "server/codec.h"

namespace attn::server {

enum class StreamRequestKind : std::uint8_t {
  kNone,
  kForward,
  kAttend,
  kOpen,
  kFork,
  kClose,
  kCancel
};

struct StreamEnvelope {
  std::uint64_t id = 0;
  double timeout_seconds = 0.0;
  StreamRequestKind kind = StreamRequestKind::kNone;
  std::uint64_t cancel = 0;  // of kCancel: the id of the request to give up
  RequestBytes request;      // of the others; valid as long as the message's bytes
  absl::Status status;       // INVALID_ARGUMENT where the envelope is broken; `id` as far as known
};

StreamEnvelope ReadStreamEnvelope(const RequestBytes& bytes);

// The answer to request `id`, around the answer of a unary call of the same kind.
Answer WrapStreamAnswer(std::uint64_t id, StreamRequestKind kind, Answer answer);
Answer StreamError(std::uint64_t id, const absl::Status& status);

}  // namespace attn::server
