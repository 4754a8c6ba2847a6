// Where a benchmark's work runs while the server serves: executions in their turn on the device,
// and pauses in between. The server's queue is one such place (server/benchmark_runner.h).
#pragma once

#include <chrono>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "core/device.h"

namespace attn {

using BenchmarkClock = std::chrono::steady_clock;

// What a job gets: kernels read `stop` with __atomic_load_n and give up when it becomes true.
using BenchmarkJob = absl::FunctionRef<void(const bool* stop)>;

class BenchmarkRunner {
 public:
  virtual ~BenchmarkRunner() = default;

  // Runs `job` on the device's driver and returns when it is done. At `deadline`, or when the
  // benchmark is cancelled, a job that waits is given up and one that runs is told to stop:
  // DEADLINE_EXCEEDED or CANCELLED, and what it computed is not to be used. Not from the driver.
  virtual absl::Status Execute(BenchmarkJob job, BenchmarkClock::time_point deadline) = 0;

  // Leaves the device to others until then. CANCELLED.
  virtual absl::Status PauseUntil(BenchmarkClock::time_point time) = 0;
};

// Runs at once, between the executor's other jobs: for programs and tests without a queue. Looks
// at `cancelled` (may be null), and at the deadline, before each job alone.
class DirectRunner final : public BenchmarkRunner {
 public:
  explicit DirectRunner(Device& device, const bool* cancelled = nullptr)
      : device_(device), cancelled_(cancelled) {}

  absl::Status Execute(BenchmarkJob job, BenchmarkClock::time_point deadline) override;
  absl::Status PauseUntil(BenchmarkClock::time_point time) override;

 private:
  absl::Status Wanted() const;

  Device& device_;
  const bool* const cancelled_;
};

}  // namespace attn
