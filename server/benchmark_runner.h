// A benchmark's executions in the server's queue: behind all requests. Under full load, where a job
// of the lowest priority would wait for ever, one that has waited for a while takes an ordinary
// request's place in the order; its share (core/attention_benchmark.h) bounds what that costs.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>

#include "core/benchmark_runner.h"
#include "server/call_context.h"
#include "server/device_queue.h"

namespace attn::server {

class QueueRunner final : public BenchmarkRunner {
 public:
  static constexpr std::int32_t kLowestPriority = std::numeric_limits<std::int32_t>::min();

  // Cancelling `call` ends what is under way. It gets its hook here, and is used for nothing else.
  QueueRunner(DeviceQueue& queue, std::shared_ptr<CallContext> call);

  absl::Status Execute(BenchmarkJob job, BenchmarkClock::time_point deadline) override;
  absl::Status PauseUntil(BenchmarkClock::time_point time) override;

 private:
  // One job in the queue. It may be dropped, or find itself withdrawn, after Execute has returned.
  struct Turn {
    std::shared_ptr<CallContext> call;
    bool started = false;
    bool withdrawn = false;  // does not run any more
    bool done = false;
    bool ran = false;
  };
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    bool cancelled = false;
    std::shared_ptr<Turn> turn;
  };

  absl::Status Push(const std::shared_ptr<Turn>& turn, BenchmarkJob job, std::int32_t priority);
  // Waits for its end; takes it back where it has not started by `patience`.
  void Await(const std::shared_ptr<Turn>& turn, BenchmarkClock::time_point patience,
             BenchmarkClock::time_point deadline);

  DeviceQueue& queue_;
  const std::shared_ptr<CallContext> call_;
  const std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
};

}  // namespace attn::server
