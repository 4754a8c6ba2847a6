// A device's cores. One driver thread takes jobs in order; inside a job, ParallelFor spreads a
// kernel's tasks over the driver and its workers. Only jobs call ATen or run kernels: libgomp makes
// a team of threads for every host thread that opens a parallel region, so all of them are opened
// by the one driver.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace attn {

class Executor {
 public:
  struct Options {
    int threads = 1;  // driver included
    int spin_microseconds =
        20;  // an idle worker spins this long before it sleeps (a futex wake-up costs 5 to 15 us)
    std::function<void(int threads)>
        on_driver_start;  // runs first on the driver: sets LibTorch's thread count
  };

  explicit Executor(Options options);
  // Finishes the jobs that were posted, then stops.
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Runs `job` on the driver after all jobs posted before. From any thread.
  void Post(std::function<void()> job);

  // Posts `job` and waits for it. Not from the driver.
  void Run(absl::FunctionRef<void()> job);

  // Calls task(index, worker) for every index in [0, num_tasks); returns when all are done. Workers
  // are numbered in [0, min(threads(), num_tasks)), each has one task at a time. On the driver
  // only. Indices are handed out in order: put the longest first.
  void ParallelFor(std::int64_t num_tasks,
                   absl::FunctionRef<void(std::int64_t index, int worker)> task);

  int threads() const { return options_.threads; }
  bool OnDriver() const { return std::this_thread::get_id() == driver_.get_id(); }

 private:
  struct Region;

  void DriverLoop();
  void WorkerLoop();
  static void RunTasks(Region& region, int worker);

  const Options options_;

  std::mutex jobs_mutex_;
  std::condition_variable jobs_ready_;
  std::deque<std::function<void()>> jobs_;
  bool stopping_ = false;

  // The open parallel region, published under region_mutex_; generation_ lets workers spin without
  // the lock.
  std::mutex region_mutex_;
  std::condition_variable region_ready_;
  Region* region_ = nullptr;
  std::atomic<std::uint64_t> generation_{0};
  bool workers_stopping_ = false;

  std::vector<std::thread> workers_;
  std::thread driver_;
};

}  // namespace attn
