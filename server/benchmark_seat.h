// The server's one place for a benchmark: two at a time would measure each other.
#pragma once

#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "server/call_context.h"

namespace attn::server {

class BenchmarkSeat {
 public:
  // RESOURCE_EXHAUSTED (reason BENCHMARK_RUNNING) while another one has it, with the time until
  // that one's end; UNAVAILABLE (reason DRAINING) once it is closed.
  absl::Status Take(std::shared_ptr<CallContext> call, Clock::time_point end);
  void Leave();

  // Cancels the one that runs; no other gets the place.
  void Close();
  // OK, or why a benchmark that was cancelled was so: the server's reason, or its caller's.
  absl::Status Reason(const CallContext& call) const;

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<CallContext> running_;
  Clock::time_point end_;
  bool closed_ = false;
};

}  // namespace attn::server
