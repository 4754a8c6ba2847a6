#include "server/device_queue.h"

#include <algorithm>
#include <chrono>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn::server {

absl::Status DeviceQueue::Push(Job job) {
  const std::shared_ptr<CallContext> call = job.call;
  {
    std::lock_guard lock(mutex_);
    if (jobs_.size() >= capacity_) {
      absl::Status status =
          MakeError(absl::StatusCode::kResourceExhausted, "QUEUE_FULL",
                    absl::StrCat("the device's queue of ", capacity_, " requests is full"));
      SetRetryDelay(status,
                    std::max(0.001, mean_seconds_ * static_cast<double>(jobs_.size()) / 2.0));
      return status;
    }
    // Behind the last one that it does not overtake; from the back, where it nearly always is.
    auto place = jobs_.end();
    while (place != jobs_.begin() && std::prev(place)->priority < job.priority) --place;
    jobs_.insert(place, std::move(job));
  }
  // One turn for every job: the turn of a job that was removed finds another one, or none.
  executor_.Post([this] { RunNext(); });
  call->OnCancel([this, call = call.get()] { Remove(call); });
  return absl::OkStatus();
}

void DeviceQueue::RunNext() {
  Job job;
  {
    std::lock_guard lock(mutex_);
    if (jobs_.empty()) return;
    job = std::move(jobs_.front());
    jobs_.pop_front();
  }
  absl::Status wanted = job.call->Wanted();
  if (!wanted.ok()) return job.drop(std::move(wanted));
  const Clock::time_point start = Clock::now();
  job.run();
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  constexpr double kWeight = 0.05;
  std::lock_guard lock(mutex_);
  mean_seconds_ += kWeight * (seconds - mean_seconds_);
}

void DeviceQueue::Remove(const CallContext* call) {
  Job job;
  {
    std::lock_guard lock(mutex_);
    const auto found = std::find_if(jobs_.begin(), jobs_.end(),
                                    [&](const Job& waiting) { return waiting.call.get() == call; });
    if (found == jobs_.end()) return;  // it is being executed, or was answered
    job = std::move(*found);
    jobs_.erase(found);
  }
  job.drop(job.call->Wanted());
}

std::size_t DeviceQueue::size() const {
  std::lock_guard lock(mutex_);
  return jobs_.size();
}

}  // namespace attn::server
