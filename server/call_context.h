// What every call has, whatever carried it here: when it came, until when it is wanted, whether it
// still is, and the facts that the metrics record about it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "server/answer.h"
#include "server/memory_budget.h"

namespace attn::server {

using Clock = std::chrono::steady_clock;

// Filled by the handler that executes the call; read once, when the call is answered.
struct CallFacts {
  std::string model;  // of a model that exists; "" otherwise: labels are never a caller's invention
  std::string modality;        // of the layer; "" without a model, and where nothing says it
  std::string implementation;  // that executed
  bool executed = false;
  bool fell_back =
      false;  // another implementation than the active one, because that could not do it
  double queue_seconds = 0.0;
  double compute_seconds = 0.0;
  std::uint64_t peak_workspace_bytes = 0;
  std::uint64_t cached_tokens = 0;  // that sessions' caches got
};

class CallContext {
 public:
  explicit CallContext(Clock::time_point deadline_time = Clock::time_point::max())
      : arrival(Clock::now()), deadline(deadline_time) {}

  const Clock::time_point arrival;
  const Clock::time_point deadline;
  // What carries the call bounds the bytes of its answers by this, beside the server's own budget;
  // null: it does not. Set before the call is dispatched.
  std::shared_ptr<MemoryBudget> answer_budget;
  // Takes answers before the last one, of rpcs that have several; null: there is nobody to take
  // them. One that is not `needed` may be dropped. Set before the call is dispatched.
  std::function<void(Answer answer, bool needed)> send;
  CallFacts facts;

  // The caller is gone, or does not want the answer any more. From any thread, any number of times.
  void Cancel() {
    std::function<void()> hook;
    {
      std::lock_guard lock(mutex_);
      __atomic_store_n(&cancelled_, true, __ATOMIC_RELAXED);
      hook = std::move(hook_);
      hook_ = nullptr;
    }
    if (hook) hook();
  }

  // `hook` runs once, on the thread that cancels; at once if that has happened.
  void OnCancel(std::function<void()> hook) {
    {
      std::lock_guard lock(mutex_);
      if (!cancelled()) {
        hook_ = std::move(hook);
        return;
      }
    }
    hook();
  }

  // Bytes that are the call's until whatever carries it is done with it, its answer sent included.
  void Hold(MemoryBudget::Reservation reservation) {
    std::lock_guard lock(mutex_);
    reservations_.push_back(std::move(reservation));
  }

  bool cancelled() const { return __atomic_load_n(&cancelled_, __ATOMIC_RELAXED); }
  const bool* cancelled_flag() const { return &cancelled_; }  // for kernels
  bool expired() const { return Clock::now() >= deadline; }

  // CANCELLED or DEADLINE_EXCEEDED where the answer is no longer wanted.
  absl::Status Wanted() const;

 private:
  std::mutex mutex_;
  std::function<void()> hook_;
  bool cancelled_ = false;
  std::vector<MemoryBudget::Reservation> reservations_;
};

}  // namespace attn::server
