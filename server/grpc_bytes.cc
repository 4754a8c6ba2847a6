#include "server/grpc_bytes.h"

#include <grpcpp/support/proto_buffer_reader.h>
#include <grpcpp/support/slice.h>

#include <chrono>
#include <utility>
#include <vector>

namespace attn::server {
namespace {

// Callers that want no deadline may send one of centuries: sums of it would overflow.
constexpr std::int64_t kForeverSeconds = std::int64_t{10} * 365 * 24 * 3600;

// A slice over memory that stays alive as long as gRPC sends it.
grpc::Slice ToSlice(AnswerPiece piece) {
  auto* const owner = new AnswerPiece(std::move(piece));
  return {const_cast<void*>(owner->data()), owner->size(),
          [](void* user_data) { delete static_cast<AnswerPiece*>(user_data); }, owner};
}

}  // namespace

Clock::time_point DeadlineOf(const grpc::CallbackServerContext& context) {
  const gpr_timespec deadline = context.raw_deadline();
  const gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
  if (left.tv_sec > kForeverSeconds) return Clock::time_point::max();
  return Clock::now() + std::chrono::seconds(left.tv_sec) + std::chrono::nanoseconds(left.tv_nsec);
}

RequestBytes BytesOf(const grpc::ByteBuffer& buffer) {
  RequestBytes bytes;
  bytes.size = buffer.Length();
  // The reader wants a mutable pointer and only takes references of the slices.
  bytes.open = [mutable_buffer = const_cast<grpc::ByteBuffer*>(&buffer)] {
    return std::make_unique<grpc::ProtoBufferReader>(mutable_buffer);
  };
  return bytes;
}

grpc::ByteBuffer ToByteBuffer(Answer answer) {
  std::vector<grpc::Slice> slices;
  slices.reserve(answer.pieces.size());
  for (AnswerPiece& piece : answer.pieces) slices.push_back(ToSlice(std::move(piece)));
  return {slices.data(), slices.size()};
}

}  // namespace attn::server
