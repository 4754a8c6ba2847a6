// Everything that handlers work on: devices with their queues and workspaces, models, budget,
// metrics, limits.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/attention_benchmark.h"
#include "core/device.h"
#include "core/hardware.h"
#include "core/model_registry.h"
#include "core/session_table.h"
#include "core/workspace.h"
#include "server/benchmark_seat.h"
#include "server/device_queue.h"
#include "server/memory_budget.h"
#include "server/metrics.h"
#include "server/session_lanes.h"
#include "server/timer.h"

namespace attn::server {

struct ServerLimits {
  std::uint64_t max_message_bytes = std::uint64_t{64} << 20;
  std::uint64_t max_inflight_bytes = std::uint64_t{1} << 30;
  std::uint64_t max_workspace_bytes = std::uint64_t{2} << 30;
  std::uint64_t memory_efficient_bytes = kDefaultMemoryBudget;
  std::int64_t max_tokens = std::int64_t{1} << 22;
  std::size_t queue_capacity = 256;
  std::uint64_t cache_bytes = std::uint64_t{1} << 30;  // of all sessions
  std::size_t max_stream_requests = 256;               // of one stream, unanswered
  std::uint64_t max_stream_bytes = std::uint64_t{256} << 20;
};

struct BenchmarkSettings {
  double share = kDefaultBenchmarkShare;  // of a device's time
  double default_seconds = kDefaultBenchmarkSeconds;
  std::uint64_t max_bytes = kDefaultBenchmarkBytes;      // where a benchmark asks for no other
  std::string timings_file;                              // empty: timings end with the server
  std::function<void(const std::string& message)> warn;  // into the log; may be empty
};

struct ServerOptions {
  ServerLimits limits;
  SessionTable::Options sessions;
  Executor::Options cpu;   // one CPU device over all cores
  std::string model_root;  // of LoadModel
  BenchmarkSettings benchmarks;
  // What selectors and GetHardware are told; tests put a description of their own in its place.
  std::shared_ptr<const HardwareSource> hardware = SystemHardware();
};

class ServerState {
 public:
  ServerState(const ServerOptions& options, ImplementationTable table);
  ~ServerState();

  const ServerOptions& options() const { return options_; }
  const ServerLimits& limits() const { return options_.limits; }
  const std::string& epoch() const { return epoch_; }
  ModelRegistry& registry() { return *registry_; }
  MemoryBudget& budget() { return *budget_; }
  Metrics& metrics() { return metrics_; }
  DeviceQueue& queue(const Device& device);
  const std::vector<std::unique_ptr<DeviceQueue>>& queues() const { return queues_; }
  SessionTable& sessions() { return *sessions_; }
  const SessionTable& sessions() const { return *sessions_; }
  SessionLanes& lanes() { return *lanes_; }
  Timer& timer() { return *timer_; }
  // Slow control-plane work (loading models), one after the other, off gRPC's threads.
  Executor& background() { return *background_; }
  // The thread of the one benchmark that has the seat.
  Executor& benchmarks() { return *benchmarks_; }
  BenchmarkSeat& benchmark_seat() { return benchmark_seat_; }

 private:
  void ExpireSessions();

  const ServerOptions options_;
  const std::string epoch_;
  Metrics metrics_;
  std::shared_ptr<MemoryBudget> budget_;
  std::vector<std::unique_ptr<Device>> devices_;
  std::vector<std::unique_ptr<Workspace>> workspaces_;  // parallel to devices_
  std::vector<std::unique_ptr<DeviceQueue>> queues_;    // parallel to devices_
  std::unique_ptr<ModelRegistry> registry_;
  std::unique_ptr<SessionTable> sessions_;
  std::unique_ptr<SessionLanes> lanes_;
  std::unique_ptr<Timer> timer_;
  std::unique_ptr<Executor> background_;
  BenchmarkSeat benchmark_seat_;
  std::unique_ptr<Executor> benchmarks_;
};

}  // namespace attn::server
