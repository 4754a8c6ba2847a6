#include "core/benchmark_runner.h"

#include <thread>

namespace attn {

absl::Status DirectRunner::Wanted() const {
  const bool cancelled = cancelled_ != nullptr && __atomic_load_n(cancelled_, __ATOMIC_RELAXED);
  return cancelled ? absl::CancelledError("the benchmark was cancelled") : absl::OkStatus();
}

absl::Status DirectRunner::Execute(BenchmarkJob job, BenchmarkClock::time_point deadline) {
  if (absl::Status wanted = Wanted(); !wanted.ok()) return wanted;
  if (BenchmarkClock::now() >= deadline) {
    return absl::DeadlineExceededError("the benchmark's time is over");
  }
  const bool never = false;
  device_.executor().Run([&] { job(cancelled_ == nullptr ? &never : cancelled_); });
  return Wanted();
}

absl::Status DirectRunner::PauseUntil(BenchmarkClock::time_point time) {
  std::this_thread::sleep_until(time);
  return Wanted();
}

}  // namespace attn
