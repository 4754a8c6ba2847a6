// The standard gRPC health service (grpc.health.v1): Check and Watch, for the server as a whole
// ("") and for each of the API's services.
#pragma once

#include <mutex>
#include <set>

#include "grpc/health/v1/health.grpc.pb.h"

namespace attn::server {

class HealthService final : public grpc::health::v1::Health::CallbackService {
 public:
  HealthService() = default;

  void SetServing(bool serving);
  // Ends every Watch, after its last status was sent.
  void Close();

  grpc::ServerUnaryReactor* Check(grpc::CallbackServerContext* context,
                                  const grpc::health::v1::HealthCheckRequest* request,
                                  grpc::health::v1::HealthCheckResponse* response) override;
  grpc::ServerWriteReactor<grpc::health::v1::HealthCheckResponse>* Watch(
      grpc::CallbackServerContext* context,
      const grpc::health::v1::HealthCheckRequest* request) override;

 private:
  class Watcher;

  // Under mutex_.
  grpc::health::v1::HealthCheckResponse::ServingStatus StatusOf(bool known) const;

  std::mutex mutex_;
  bool serving_ = false;
  bool closed_ = false;
  std::set<Watcher*> watchers_;
};

}  // namespace attn::server
