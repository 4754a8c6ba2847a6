#include "core/executor.h"

#include <cassert>
#include <chrono>

namespace attn {

// Lives on the driver's stack. Workers enter under region_mutex_ while region_ points to it, so
// that the driver, which takes the pointer back under the same mutex, knows whom to wait for.
struct Executor::Region {
  explicit Region(absl::FunctionRef<void(std::int64_t, int)> body, std::int64_t count)
      : task(body), num_tasks(count) {}

  absl::FunctionRef<void(std::int64_t, int)> task;
  const std::int64_t num_tasks;
  std::atomic<std::int64_t> next{0};
  int workers = 1;             // that take part, the driver included; under region_mutex_
  std::atomic<int> inside{0};  // workers that may still touch this region
};

Executor::Executor(Options options) : options_(std::move(options)) {
  for (int worker = 1; worker < options_.threads; ++worker) {
    workers_.emplace_back([this] { WorkerLoop(); });
  }
  driver_ = std::thread([this] { DriverLoop(); });
}

Executor::~Executor() {
  {
    std::lock_guard lock(jobs_mutex_);
    stopping_ = true;
  }
  jobs_ready_.notify_all();
  driver_.join();
  {
    std::lock_guard lock(region_mutex_);
    workers_stopping_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  region_ready_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Executor::Post(std::function<void()> job) {
  {
    std::lock_guard lock(jobs_mutex_);
    jobs_.push_back(std::move(job));
  }
  jobs_ready_.notify_one();
}

void Executor::Run(absl::FunctionRef<void()> job) {
  assert(!OnDriver());
  std::mutex mutex;
  std::condition_variable finished;
  bool done = false;
  Post([&] {
    job();
    // Notified under the lock: the waiter's stack is gone as soon as it has seen `done`.
    std::lock_guard lock(mutex);
    done = true;
    finished.notify_one();
  });
  std::unique_lock lock(mutex);
  finished.wait(lock, [&] { return done; });
}

void Executor::DriverLoop() {
  if (options_.on_driver_start) options_.on_driver_start(options_.threads);
  while (true) {
    std::function<void()> job;
    {
      std::unique_lock lock(jobs_mutex_);
      jobs_ready_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job();
  }
}

void Executor::RunTasks(Region& region, int worker) {
  while (true) {
    const std::int64_t index = region.next.fetch_add(1, std::memory_order_relaxed);
    if (index >= region.num_tasks) return;
    region.task(index, worker);
  }
}

void Executor::ParallelFor(std::int64_t num_tasks,
                           absl::FunctionRef<void(std::int64_t, int)> task) {
  assert(OnDriver());
  Region region(task, num_tasks);
  const bool alone = num_tasks <= 1 || workers_.empty();
  if (!alone) {
    {
      std::lock_guard lock(region_mutex_);
      region_ = &region;
      generation_.fetch_add(1, std::memory_order_release);
    }
    region_ready_.notify_all();
  }
  RunTasks(region, 0);
  if (alone) return;
  {
    std::lock_guard lock(region_mutex_);
    region_ = nullptr;
  }
  // Tasks are short next to a sleep and a wake-up: the few microseconds in which workers finish
  // theirs are spun through.
  while (region.inside.load(std::memory_order_acquire) != 0) std::this_thread::yield();
}

void Executor::WorkerLoop() {
  const auto spin = std::chrono::microseconds(options_.spin_microseconds);
  std::uint64_t seen = 0;
  while (true) {
    const auto deadline = std::chrono::steady_clock::now() + spin;
    while (generation_.load(std::memory_order_acquire) == seen &&
           std::chrono::steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
    Region* region = nullptr;
    int worker = 0;
    {
      std::unique_lock lock(region_mutex_);
      region_ready_.wait(lock, [&] {
        return workers_stopping_ || generation_.load(std::memory_order_relaxed) != seen;
      });
      if (workers_stopping_) return;
      seen = generation_.load(std::memory_order_relaxed);
      region = region_;
      if (region != nullptr && region->workers < region->num_tasks) {
        worker = region->workers++;
        region->inside.fetch_add(1, std::memory_order_relaxed);
      } else {
        region = nullptr;  // over before this worker woke up, or served by others
      }
    }
    if (region == nullptr) continue;
    RunTasks(*region, worker);
    region->inside.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace attn
