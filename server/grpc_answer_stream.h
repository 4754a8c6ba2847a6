// An rpc with one request and a stream of answers over gRPC: what its handler sends through the
// call's context, one after the other, then its status.
#pragma once

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "server/dispatcher.h"

namespace attn::server {

// Deletes itself when gRPC is done with it.
grpc::ServerWriteReactor<grpc::ByteBuffer>* NewAnswerStream(Dispatcher& dispatcher, const Rpc& rpc,
                                                            grpc::CallbackServerContext& context,
                                                            const grpc::ByteBuffer& request);

}  // namespace attn::server
