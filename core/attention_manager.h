// One model on one device: an instance of every implementation, and the choice between them for
// each execution.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/attention_module.h"
#include "core/hosted_model.h"
#include "core/selector.h"

namespace attn {

// A pool's choice at one moment; requests keep the one that they started with.
struct Active {
  const ImplementationRow* row = nullptr;  // null: "auto"
  std::string reason;

  const std::string& name() const;
};

class BenchmarkProblem;
class BenchmarkRunner;
struct BenchmarkOptions;
struct BenchmarkResult;

struct Choice {
  Selection selection;
  std::shared_ptr<const AttentionImplementation> implementation;
};

class AttentionManager {
 public:
  // `selector` outlives the manager; without one the table's order decides for "auto".
  AttentionManager(Device& device, Workspace& workspace, ImplementationTable table,
                   const Selector* selector = nullptr);

  Device& device() { return device_; }
  Workspace& workspace() { return workspace_; }
  ImplementationTable table() const { return table_; }
  const Selector* selector() const { return selector_; }

  // The implementation for one execution on this device.
  absl::StatusOr<Choice> SelectAttentionModule(const SelectionRequest& request,
                                               const AttentionShape& shape) const;

  const AttentionImplementation& implementation(const ImplementationRow& row) const {
    return *implementations_[static_cast<std::size_t>(&row - table_.data())];
  }

  // Times implementations on the sample, side by side; see core/attention_benchmark.h, where it is
  // defined.
  absl::StatusOr<std::vector<BenchmarkResult>> BenchmarkAttentionTypes(
      BenchmarkProblem& sample, Workspace& workspace, BenchmarkRunner& runner,
      const BenchmarkOptions& options);

  // Executed requests and those that wait, for ListModels.
  std::atomic<std::uint32_t> queued{0};
  std::atomic<std::uint32_t> executing{0};

 private:
  Device& device_;
  Workspace& workspace_;
  const ImplementationTable table_;
  const Selector* const selector_;
  std::vector<std::shared_ptr<const AttentionImplementation>>
      implementations_;  // parallel to table_
};

}  // namespace attn
