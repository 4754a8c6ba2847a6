// The Stream rpc over gRPC: reads messages into a RequestStream, sends its answers one by one.
#pragma once

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "server/dispatcher.h"
#include "server/server_state.h"

namespace attn::server {

// Deletes itself when gRPC is done with it.
grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* NewStreamReactor(
    ServerState& state, Dispatcher& dispatcher, grpc::CallbackServerContext& context);

}  // namespace attn::server
