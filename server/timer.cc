#include "server/timer.h"

namespace attn::server {

void Timer::Stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_one();
  if (thread_.joinable()) thread_.join();
}

Timer::Id Timer::At(Clock::time_point time, std::function<void()> run) {
  std::lock_guard lock(mutex_);
  const Id id(time, next_++);
  const auto entry = due_.emplace(id, std::move(run)).first;
  if (entry == due_.begin()) changed_.notify_one();
  return id;
}

void Timer::Cancel(const Id& id) {
  std::function<void()> dropped;  // what it holds is freed outside the lock
  std::lock_guard lock(mutex_);
  const auto entry = due_.find(id);
  if (entry == due_.end()) return;
  dropped = std::move(entry->second);
  due_.erase(entry);
}

void Timer::Loop() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (due_.empty()) {
      changed_.wait(lock);
      continue;
    }
    const auto first = due_.begin();
    const Clock::time_point time = first->first.first;
    if (Clock::now() < time) {
      changed_.wait_until(lock, time);
      continue;
    }
    std::function<void()> run = std::move(first->second);
    due_.erase(first);
    lock.unlock();
    run();
    run = nullptr;
    lock.lock();
  }
}

}  // namespace attn::server
