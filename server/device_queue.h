// The bounded queue in front of a device's executor: by priority, then first in, first out. What
// has expired or was cancelled leaves it unexecuted; a full queue sheds.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "core/executor.h"
#include "server/call_context.h"

namespace attn::server {

class DeviceQueue {
 public:
  struct Job {
    std::shared_ptr<CallContext> call;
    std::int32_t priority = 0;               // higher first
    std::function<void()> run;               // on the executor's driver
    std::function<void(absl::Status)> drop;  // instead of `run`, from any thread
  };

  // `name` is the device's.
  DeviceQueue(std::string name, Executor& executor, std::size_t capacity)
      : name_(std::move(name)), executor_(executor), capacity_(capacity) {}

  const std::string& name() const { return name_; }

  // Exactly one of run and drop is called for an accepted job. RESOURCE_EXHAUSTED (reason
  // QUEUE_FULL) with a delay to retry after: then neither is called.
  absl::Status Push(Job job);

  std::size_t size() const;
  std::size_t capacity() const { return capacity_; }

 private:
  void RunNext();
  void Remove(const CallContext* call);

  const std::string name_;
  Executor& executor_;
  const std::size_t capacity_;
  mutable std::mutex mutex_;
  std::list<Job> jobs_;
  double mean_seconds_ = 0.0;  // of recent executions, for the delay that a shed caller is told
};

}  // namespace attn::server
