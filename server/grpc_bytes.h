// Between gRPC's byte buffers and ours, without copies; deadlines as gRPC tells them.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>

#include "server/answer.h"
#include "server/call_context.h"
#include "server/codec.h"

namespace attn::server {

Clock::time_point DeadlineOf(const grpc::CallbackServerContext& context);

// Valid as long as `buffer`.
RequestBytes BytesOf(const grpc::ByteBuffer& buffer);

// The answer's memory is kept until gRPC has sent it.
grpc::ByteBuffer ToByteBuffer(Answer answer);

}  // namespace attn::server
