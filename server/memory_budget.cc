#include "server/memory_budget.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn::server {

// In-flight requests take milliseconds: the delay only spreads retries out.
constexpr double kRetryDelaySeconds = 0.05;

MemoryBudget::Reservation& MemoryBudget::Reservation::operator=(Reservation&& other) noexcept {
  std::swap(budget_, other.budget_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

MemoryBudget::Reservation::~Reservation() {
  if (budget_ == nullptr) return;
  std::lock_guard lock(budget_->mutex_);
  budget_->used_ -= bytes_;
}

absl::StatusOr<MemoryBudget::Reservation> MemoryBudget::Reserve(std::uint64_t bytes) {
  {
    std::lock_guard lock(mutex_);
    if (bytes <= limit_ - used_) {
      used_ += bytes;
      return Reservation(shared_from_this(), bytes);
    }
  }
  absl::Status status =
      MakeError(absl::StatusCode::kResourceExhausted, reason_,
                absl::StrCat("the call needs ", bytes, " bytes, which the limit of ", limit_,
                             " bytes in flight does not have free"));
  if (bytes <= limit_) SetRetryDelay(status, kRetryDelaySeconds);
  return status;
}

std::uint64_t MemoryBudget::used() const {
  std::lock_guard lock(mutex_);
  return used_;
}

}  // namespace attn::server
