// The API's services over gRPC: raw callbacks that hand received bytes to the dispatcher and send
// its answer's pieces.
#pragma once

#include <grpcpp/impl/service_type.h>

#include <memory>

#include "server/dispatcher.h"

namespace attn::server {

// State and dispatcher outlive the services.
std::unique_ptr<grpc::Service> MakeAttentionService(ServerState& state, Dispatcher& dispatcher);
std::unique_ptr<grpc::Service> MakeAdminService(Dispatcher& dispatcher);

}  // namespace attn::server
