// A bound on bytes in flight: of all requests and answers together, of one stream's answers.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "absl/status/statusor.h"

namespace attn::server {

class MemoryBudget : public std::enable_shared_from_this<MemoryBudget> {
 public:
  // Gives its bytes back when destroyed.
  class Reservation {
   public:
    Reservation() = default;
    Reservation(Reservation&& other) noexcept
        : budget_(std::move(other.budget_)), bytes_(other.bytes_) {}
    Reservation& operator=(Reservation&& other) noexcept;
    ~Reservation();

   private:
    friend class MemoryBudget;
    Reservation(std::shared_ptr<MemoryBudget> budget, std::uint64_t bytes)
        : budget_(std::move(budget)), bytes_(bytes) {}

    std::shared_ptr<MemoryBudget> budget_;
    std::uint64_t bytes_ = 0;
  };

  // `reason` is that of a refusal.
  explicit MemoryBudget(std::uint64_t limit, const char* reason = "MEMORY_BUDGET")
      : limit_(limit), reason_(reason) {}

  // RESOURCE_EXHAUSTED, with a delay to retry after unless `bytes` alone is
  // beyond the budget.
  absl::StatusOr<Reservation> Reserve(std::uint64_t bytes);

  std::uint64_t used() const;
  std::uint64_t limit() const { return limit_; }

 private:
  const std::uint64_t limit_;
  const char* const reason_;
  mutable std::mutex mutex_;
  std::uint64_t used_ = 0;
};

}  // namespace attn::server
