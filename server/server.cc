#include "server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/server_builder.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <future>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "server/benchmark_handlers.h"
#include "server/grpc_services.h"
#include "server/listen_address.h"
#include "server/spec_codec.h"

namespace attn::server {
namespace {

constexpr int kMaxMetadataBytes = 16 << 10;
constexpr int kMaxConcurrentStreams = 1024;
constexpr int kMinPingMilliseconds = 10000;
constexpr int kHttp2FrameBytes = 1 << 20;  // fewer, larger reads of large tensors
// Of the transport, beside the budget of received requests and answers.
constexpr std::size_t kTransportBytes = std::size_t{256} << 20;

// How long answers that were given may take to leave.
constexpr std::chrono::seconds kTransportGrace(1);

ServerOptions OptionsOf(const ServerConfig& config) {
  ServerOptions options;
  options.limits.max_message_bytes = config.max_message_bytes();
  options.limits.max_inflight_bytes = config.max_inflight_bytes();
  options.limits.max_workspace_bytes = config.max_workspace_bytes();
  options.limits.memory_efficient_bytes = config.memory_efficient_bytes();
  options.limits.max_tokens = static_cast<std::int64_t>(config.max_tokens());
  options.limits.queue_capacity = config.queue_capacity();
  options.limits.cache_bytes = config.cache_bytes();
  options.limits.max_stream_requests = config.max_stream_requests();
  options.limits.max_stream_bytes = config.max_stream_bytes();
  options.sessions.max_sessions = config.max_sessions();
  options.sessions.default_time_to_live_seconds = config.session_time_to_live_seconds();
  options.sessions.max_time_to_live_seconds = config.max_session_time_to_live_seconds();
  options.cpu.threads = static_cast<int>(config.threads());
  options.cpu.spin_microseconds = static_cast<int>(config.executor_spin_microseconds());
  options.model_root = config.model_root();
  options.benchmarks.share = config.benchmark_share();
  options.benchmarks.default_seconds = config.benchmark_seconds();
  options.benchmarks.max_bytes = config.benchmark_bytes();
  options.benchmarks.timings_file = config.timings_file();
  options.benchmarks.warn = [](const std::string& message) { spdlog::warn(message); };
  return options;
}

// What is there of earlier benchmarks. A file that can't be used is no reason not to serve.
void ReadTimings(ServerState& state) {
  const std::string& path = state.options().benchmarks.timings_file;
  if (path.empty()) return;
  const absl::StatusOr<std::size_t> read =
      LoadTimings(path, TimingsKeyOf(state), state.registry().timings());
  if (read.ok()) {
    spdlog::info("knows {} measured timings from {}", *read, path);
  } else if (!absl::IsNotFound(read.status())) {
    spdlog::warn("ignores {}: {}", path, std::string(read.status().message()));
  }
}

absl::Status CantListen(const std::string& address, const std::string& why) {
  return MakeError(absl::StatusCode::kUnavailable, "CANT_LISTEN",
                   absl::StrCat("can't listen on ", address, ": ", why));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerConfig& config,
                                                      ImplementationTable table) {
  auto server = std::unique_ptr<Server>(new Server(config));
  server->state_ = std::make_unique<ServerState>(OptionsOf(config), table);
  ReadTimings(*server->state_);
  server->dispatcher_ = std::make_unique<Dispatcher>(*server->state_);
  ATTN_RETURN_IF_ERROR(server->LoadModels());
  ATTN_RETURN_IF_ERROR(server->StartMetrics());
  ATTN_RETURN_IF_ERROR(server->StartGrpc());
  server->health_.SetServing(true);
  ATTN_RETURN_IF_ERROR(server->WriteReadyFile());
  return server;
}

Server::~Server() {
  if (grpc_ != nullptr) grpc_->Shutdown();
}

absl::Status Server::LoadModels() {
  for (const attention::config::v1::ModelEntry& entry : config_.models()) {
    ATTN_ASSIGN_OR_RETURN(ModelSpec spec, FromProto(entry.spec()));
    if (!entry.directory().empty()) spec.weights = entry.directory();
    // The operator's own path: no root to stay under.
    const auto pool =
        state_->registry().Load(spec, entry.directory().empty() ? config_.model_root() : "");
    if (!pool.ok()) {
      return absl::Status(pool.status().code(),
                          absl::StrCat("model ", spec.name,
                                       " can't be served: ", std::string(pool.status().message())));
    }
    spdlog::info("serves model {} ({} layers, {:.1f} MiB of weights, {})", spec.name,
                 (*pool)->model()->Layers().size(),
                 static_cast<double>((*pool)->model()->weight_bytes()) / (1 << 20),
                 (*pool)->active()->name());
  }
  return absl::OkStatus();
}

absl::Status Server::StartMetrics() {
  if (config_.metrics_listen() == "off") return absl::OkStatus();
  try {
    exposer_ = std::make_unique<prometheus::Exposer>(config_.metrics_listen(), 1);
  } catch (const std::exception&) {  // civetweb's text does not say more
    return CantListen(config_.metrics_listen(), "the address is in use or not this machine's");
  }
  collector_ = std::make_shared<StateCollector>(*state_);
  exposer_->RegisterCollectable(state_->metrics().registry());
  exposer_->RegisterCollectable(collector_);
  metrics_address_ = WithPort(config_.metrics_listen(), exposer_->GetListeningPorts().front());
  return absl::OkStatus();
}

absl::Status Server::StartGrpc() {
  grpc::EnableDefaultHealthCheckService(false);  // ours has a descriptor, so reflection knows it
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  attention_service_ = MakeAttentionService(*state_, *dispatcher_);
  admin_service_ = MakeAdminService(*dispatcher_);

  grpc::ServerBuilder builder;
  const int message_bytes = static_cast<int>(config_.max_message_bytes());
  builder.SetMaxReceiveMessageSize(message_bytes);
  builder.SetMaxSendMessageSize(message_bytes);
  // A compressed message can be a thousand times its size on the wire, and tensors hardly compress.
  for (int i = GRPC_COMPRESS_NONE + 1; i < GRPC_COMPRESS_ALGORITHMS_COUNT; ++i) {
    builder.SetCompressionAlgorithmSupportStatus(static_cast<grpc_compression_algorithm>(i), false);
  }
  // Two servers on one port would each get a part of the calls: the second one is to fail instead.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxConcurrentStreams);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kHttp2FrameBytes);
  // Clients of idle streams and sessions keep their connections through proxies; gRPC's own default
  // ends those that ping more often than every five minutes.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kMinPingMilliseconds);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  grpc::ResourceQuota quota("attnd");
  quota.Resize(config_.max_inflight_bytes() + kTransportBytes);
  builder.SetResourceQuota(quota);
  std::vector<int> ports(static_cast<std::size_t>(config_.listen_size()), -1);
  for (int i = 0; i < config_.listen_size(); ++i) {
    builder.AddListeningPort(config_.listen(i), grpc::InsecureServerCredentials(),
                             &ports[static_cast<std::size_t>(i)]);
  }
  builder.RegisterService(attention_service_.get());
  builder.RegisterService(admin_service_.get());
  builder.RegisterService(&health_);
  grpc_ = builder.BuildAndStart();
  for (int i = 0; i < config_.listen_size(); ++i) {
    const int port = ports[static_cast<std::size_t>(i)];
    const std::string& address = config_.listen(i);
    if (grpc_ == nullptr || port <= 0) {
      // gRPC starts none of them when one fails, and says only by the ports which ones it had
      // reached.
      if (port <= 0)
        return CantListen(address, "the address is in use, not this machine's, or not allowed");
      continue;
    }
    listen_.push_back(IsUnixAddress(address) ? address : WithPort(address, port));
  }
  return grpc_ == nullptr ? CantListen(config_.listen(0), "gRPC could not start")
                          : absl::OkStatus();
}

absl::Status Server::WriteReadyFile() const {
  if (config_.ready_file().empty()) return absl::OkStatus();
  const nlohmann::json content = {{"listen", listen_}, {"metrics", metrics_address_}};
  // Renamed into place: a reader sees the whole file or none.
  const std::string partial = config_.ready_file() + ".partial";
  std::ofstream file(partial);
  file << content.dump() << "\n";
  file.close();
  if (!file || std::rename(partial.c_str(), config_.ready_file().c_str()) != 0) {
    return InvalidField("ready_file", absl::StrCat("can't write ", config_.ready_file()));
  }
  return absl::OkStatus();
}

bool Server::Drain() {
  dispatcher_->BeginDrain();
  state_->benchmark_seat().Close();
  health_.SetServing(false);
  const auto budget = std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(config_.drain_seconds()));
  const bool idle = dispatcher_->WaitUntilIdle(std::chrono::steady_clock::now() + budget);
  health_.Close();
  // Left to the end of the process, and reachable until then: the leak check is to find others.
  static grpc::Server* const server = grpc_.release();
  // What is left is cancelled after a moment; answers that are on their way still leave. gRPC 1.51
  // was seen to keep Shutdown for ten seconds after a large answer over TCP, with nothing left to
  // send.
  std::promise<void> ended;
  std::future<void> end = ended.get_future();
  std::thread([ended = std::move(ended)]() mutable {
    server->Shutdown(std::chrono::system_clock::now() + kTransportGrace);
    ended.set_value();
  }).detach();
  end.wait_for(2 * kTransportGrace);
  return idle;
}

}  // namespace attn::server
