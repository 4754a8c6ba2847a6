// The running server: state, services, sockets, metrics endpoint; start and drain.
#pragma once

#include <grpcpp/server.h>
#include <prometheus/exposer.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/config.h"
#include "server/dispatcher.h"
#include "server/health_service.h"
#include "server/server_state.h"

namespace attn::server {

class Server {
 public:
  // Loads the configured models, binds, and serves when it returns. Fails with the reason.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerConfig& config,
                                                       ImplementationTable table);
  ~Server();

  // Health says NOT_SERVING, new calls are UNAVAILABLE, running ones have config.drain_seconds to
  // finish. Returns whether all of them did. Once, and only before the process ends: the transport
  // may still be closing, so that the server must not be destroyed afterwards.
  bool Drain();

  const std::vector<std::string>& listen() const { return listen_; }
  const std::string& metrics() const { return metrics_address_; }  // empty: off

 private:
  explicit Server(const ServerConfig& config) : config_(config) {}

  absl::Status LoadModels();
  absl::Status StartMetrics();
  absl::Status StartGrpc();
  absl::Status WriteReadyFile() const;

  const ServerConfig config_;
  std::unique_ptr<ServerState> state_;
  std::unique_ptr<Dispatcher> dispatcher_;
  HealthService health_;
  std::unique_ptr<grpc::Service> attention_service_;
  std::unique_ptr<grpc::Service> admin_service_;
  std::shared_ptr<StateCollector> collector_;
  std::unique_ptr<prometheus::Exposer> exposer_;
  std::unique_ptr<grpc::Server> grpc_;
  std::vector<std::string> listen_;
  std::string metrics_address_;
};

}  // namespace attn::server
