#include "server/benchmark_seat.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace attn::server {
namespace {

constexpr double kLeastDelay = 0.1;

absl::Status Draining() {
  return MakeError(absl::StatusCode::kUnavailable, "DRAINING", "the server is shutting down");
}

}  // namespace

absl::Status BenchmarkSeat::Take(std::shared_ptr<CallContext> call, Clock::time_point end) {
  std::lock_guard lock(mutex_);
  if (closed_) return Draining();
  if (running_ != nullptr) {
    absl::Status busy = MakeError(absl::StatusCode::kResourceExhausted, "BENCHMARK_RUNNING",
                                  "another benchmark is running on this server");
    const double rest = std::chrono::duration<double>(end_ - Clock::now()).count();
    SetRetryDelay(busy, std::max(rest, kLeastDelay));
    return busy;
  }
  running_ = std::move(call);
  end_ = end;
  return absl::OkStatus();
}

void BenchmarkSeat::Leave() {
  std::shared_ptr<CallContext> last;  // released outside the lock
  std::lock_guard lock(mutex_);
  last = std::move(running_);
  running_ = nullptr;
}

void BenchmarkSeat::Close() {
  std::shared_ptr<CallContext> running;
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    running = running_;
  }
  if (running != nullptr) running->Cancel();
}

absl::Status BenchmarkSeat::Reason(const CallContext& call) const {
  absl::Status wanted = call.Wanted();
  std::lock_guard lock(mutex_);
  return !wanted.ok() && closed_ ? Draining() : wanted;
}

}  // namespace attn::server
