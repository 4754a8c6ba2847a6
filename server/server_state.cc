#include "server/server_state.h"

#include <random>

#include "absl/strings/escaping.h"
#include "absl/strings/string_view.h"

namespace attn::server {
namespace {

// Scratch memory that stays allocated between executions.
constexpr std::size_t kKeptWorkspaceBytes = std::size_t{256} << 20;

// How often sessions are looked through for those that have expired.
constexpr std::chrono::seconds kExpiryInterval(1);

// Calls that may wait for sessions, for each that may wait for a device.
constexpr std::size_t kWaitingPerQueued = 16;

std::string MakeEpoch() {
  std::random_device random;
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(random() & 0xff));
  return absl::BytesToHexString(bytes);
}

}  // namespace

ServerState::ServerState(const ServerOptions& options, ImplementationTable table)
    : options_(options),
      epoch_(MakeEpoch()),
      budget_(std::make_shared<MemoryBudget>(options.limits.max_inflight_bytes)) {
  devices_.push_back(CreateCpuDevice(options.cpu));
  std::vector<DeviceSlot> slots;
  for (const std::unique_ptr<Device>& device : devices_) {
    workspaces_.push_back(std::make_unique<Workspace>(*device, options.limits.max_workspace_bytes,
                                                      kKeptWorkspaceBytes));
    queues_.push_back(std::make_unique<DeviceQueue>(device->name(), device->executor(),
                                                    options.limits.queue_capacity));
    slots.push_back({device.get(), workspaces_.back().get()});
  }
  registry_ = std::make_unique<ModelRegistry>(table, std::move(slots), options.hardware);
  sessions_ = std::make_unique<SessionTable>(
      std::make_shared<CachePool>(*devices_.front(), options.limits.cache_bytes), options.sessions);
  lanes_ =
      std::make_unique<SessionLanes>(*sessions_, kWaitingPerQueued * options.limits.queue_capacity);
  background_ = std::make_unique<Executor>(Executor::Options{});
  benchmarks_ = std::make_unique<Executor>(Executor::Options{});
  registry_->MeasureDevices();  // before the first request, which waits for it if it comes at once
  timer_ = std::make_unique<Timer>();
  ExpireSessions();
}

void ServerState::ExpireSessions() {
  sessions_->Expire();
  timer_->At(Clock::now() + kExpiryInterval, [this] { ExpireSessions(); });
}

ServerState::~ServerState() {
  // Threads first: what they run uses everything else, and finishes before they are gone. The
  // sessions' blocks go before their device.
  timer_->Stop();
  background_.reset();
  benchmark_seat_.Close();
  benchmarks_.reset();
  lanes_.reset();
  sessions_.reset();
  devices_.clear();
}

DeviceQueue& ServerState::queue(const Device& device) {
  for (std::size_t i = 0; i < devices_.size(); ++i) {
    if (devices_[i].get() == &device) return *queues_[i];
  }
  return *queues_.front();
}

}  // namespace attn::server
