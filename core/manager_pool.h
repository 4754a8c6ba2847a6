// All managers of one model, one per device, and the implementation that is active on all of them.
// A switch publishes a new immutable snapshot: requests that have started finish on theirs, none
// fails or waits.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/attention_manager.h"

namespace attn {

// A device with the scratch memory of its executions.
struct DeviceSlot {
  Device* device = nullptr;
  Workspace* workspace = nullptr;
  const Selector* selector = nullptr;  // of the device; null: the table's order
};

struct SwitchOutcome {
  bool switched = false;  // the implementation asked for is the active one now
  std::string previous;
  std::string active;
  std::string reason;
};

class ManagerPool {
 public:
  // `model` may be null: attention without a model. FAILED_PRECONDITION or NOT_FOUND where
  // `implementation` (empty: "auto") can't serve it.
  static absl::StatusOr<std::shared_ptr<ManagerPool>> Create(
      std::shared_ptr<const HostedModel> model, const std::string& implementation,
      const std::vector<DeviceSlot>& devices, ImplementationTable table);

  const HostedModel* model() const { return model_.get(); }
  const std::string& name() const { return name_; }

  std::shared_ptr<const Active> active() const;

  // NOT_FOUND for an unknown name. One that can't serve the model leaves the active one in place:
  // `switched` is false and `reason` says why.
  absl::StatusOr<SwitchOutcome> SwitchAttention(const std::string& implementation);

  // The manager that a new request goes to: the one with the least to do.
  AttentionManager& PickManager();
  const std::vector<std::unique_ptr<AttentionManager>>& managers() const { return managers_; }

  // On the first manager's device; as AttentionManager's.
  absl::StatusOr<std::vector<BenchmarkResult>> BenchmarkAttentionTypes(
      BenchmarkProblem& sample, Workspace& workspace, BenchmarkRunner& runner,
      const BenchmarkOptions& options);

  std::atomic<std::uint64_t> requests{0};
  std::uint64_t switches() const { return switches_.load(std::memory_order_relaxed); }

 private:
  ManagerPool() = default;
  // OK, or why `row` can't serve the model's layers as their specs describe them.
  absl::Status CanServe(const ImplementationRow& row) const;

  std::shared_ptr<const HostedModel> model_;
  std::string name_;
  ImplementationTable table_;
  std::vector<std::unique_ptr<AttentionManager>> managers_;
  std::atomic<std::uint64_t> switches_{0};

  // A mutex around the pointer: std::atomic<std::shared_ptr> of libstdc++ 12 is reported by the
  // thread sanitizer.
  mutable std::mutex active_mutex_;
  std::shared_ptr<const Active> active_;
};

}  // namespace attn
