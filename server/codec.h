// The wire: the only file that knows how tensors travel. Decoding yields plain calls with views
// over the received bytes, gathered once; encoding puts message headers around tensors that stay
// where they were computed. Without gRPC.
#pragma once

#include <google/protobuf/io/zero_copy_stream.h>
#include <google/protobuf/message.h>

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "attention/v1/types.pb.h"
#include "server/answer.h"
#include "server/calls.h"

namespace attn::server {

// A received message; `open` gives its bytes from the start, as often as it is called.
struct RequestBytes {
  std::uint64_t size = 0;
  std::function<std::unique_ptr<google::protobuf::io::ZeroCopyInputStream>()> open;
};

// Counts first (server/wire_limits.h), then parses. INVALID_ARGUMENT (reason MALFORMED_MESSAGE).
absl::Status ParseMessage(const RequestBytes& bytes, google::protobuf::Message& message);

// Views over the message's own bytes; undefined where the field is not set. INVALID_ARGUMENT with
// the field where a tensor's dtype, shape and bytes do not fit together; UNIMPLEMENTED for shared
// memory and result slots.
absl::StatusOr<TensorView> ReadTensor(const char* field, bool set,
                                      const attention::v1::Tensor& tensor);
absl::StatusOr<LayerRef> ReadLayer(const attention::v1::LayerRef& layer);

// The same of all of a call's fields.
absl::StatusOr<AttendCall> DecodeAttend(const RequestBytes& bytes);
absl::StatusOr<ForwardCall> DecodeForward(const RequestBytes& bytes);

Answer EncodeAttend(const AttentionAnswer& answer);
Answer EncodeForward(const AttentionAnswer& answer);

// Appends the tag and the length of a length-delimited field.
void AppendLengthHeader(int field, std::uint64_t length, std::string& out);

// A message without tensors.
Answer EncodeMessage(const google::protobuf::Message& message);

}  // namespace attn::server
