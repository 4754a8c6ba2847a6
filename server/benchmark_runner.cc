#include "server/benchmark_runner.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace attn::server {
namespace {

// How long a job waits behind all requests before it waits among them.
constexpr std::chrono::milliseconds kPatience(50);
// Before the queue is asked again after it was full.
constexpr std::chrono::milliseconds kFullPause(20);

}  // namespace

QueueRunner::QueueRunner(DeviceQueue& queue, std::shared_ptr<CallContext> call)
    : queue_(queue), call_(std::move(call)) {
  call_->OnCancel([shared = shared_] {
    std::shared_ptr<Turn> turn;
    {
      std::lock_guard lock(shared->mutex);
      shared->cancelled = true;
      turn = shared->turn;
      shared->changed.notify_all();
    }
    if (turn != nullptr) turn->call->Cancel();
  });
}

absl::Status QueueRunner::Push(const std::shared_ptr<Turn>& turn, BenchmarkJob job,
                               std::int32_t priority) {
  DeviceQueue::Job queued;
  queued.call = turn->call;
  queued.priority = priority;
  queued.run = [shared = shared_, turn, job] {
    {
      std::lock_guard lock(shared->mutex);
      if (turn->withdrawn) return;
      turn->started = true;
    }
    job(turn->call->cancelled_flag());
    std::lock_guard lock(shared->mutex);
    turn->ran = turn->done = true;
    shared->changed.notify_all();
  };
  queued.drop = [shared = shared_, turn](const absl::Status&) {
    std::lock_guard lock(shared->mutex);
    turn->done = true;
    shared->changed.notify_all();
  };
  return queue_.Push(std::move(queued));
}

void QueueRunner::Await(const std::shared_ptr<Turn>& turn, BenchmarkClock::time_point patience,
                        BenchmarkClock::time_point deadline) {
  std::unique_lock lock(shared_->mutex);
  const auto done = [&] { return turn->done; };
  if (shared_->changed.wait_until(lock, std::min(patience, deadline), done)) return;
  if (!turn->started) {
    turn->withdrawn = true;
    lock.unlock();
    return turn->call->Cancel();  // out of the queue
  }
  if (shared_->changed.wait_until(lock, deadline, done)) return;
  lock.unlock();
  turn->call->Cancel();  // the kernel stops
  lock.lock();
  shared_->changed.wait(lock, done);
}

absl::Status QueueRunner::Execute(BenchmarkJob job, BenchmarkClock::time_point deadline) {
  std::int32_t priority = kLowestPriority;
  while (true) {
    ATTN_RETURN_IF_ERROR(call_->Wanted());
    if (Clock::now() >= deadline) {
      return absl::DeadlineExceededError("the benchmark's time is over");
    }
    const auto turn = std::make_shared<Turn>();
    turn->call = std::make_shared<CallContext>(deadline);
    {
      std::lock_guard lock(shared_->mutex);
      if (shared_->cancelled) continue;  // which Wanted tells
      shared_->turn = turn;
    }
    if (!Push(turn, job, priority).ok()) {  // full
      ATTN_RETURN_IF_ERROR(PauseUntil(std::min(Clock::now() + kFullPause, deadline)));
      continue;
    }
    const bool patient = priority == kLowestPriority;
    Await(turn, patient ? Clock::now() + kPatience : deadline, deadline);
    std::lock_guard lock(shared_->mutex);
    shared_->turn = nullptr;
    if (turn->ran && !turn->call->cancelled()) return absl::OkStatus();
    priority = 0;
  }
}

absl::Status QueueRunner::PauseUntil(BenchmarkClock::time_point time) {
  {
    std::unique_lock lock(shared_->mutex);
    shared_->changed.wait_until(lock, time, [this] { return shared_->cancelled; });
  }
  return call_->Wanted();
}

}  // namespace attn::server
