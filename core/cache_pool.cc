#include "core/cache_pool.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

// Until sessions of others may have ended: a guess, for callers without a better one.
constexpr double kRetrySeconds = 1.0;

// Page tables may be as large as this share of the blocks' budget, and at least so many bytes.
constexpr std::uint64_t kTableShare = 8;
constexpr std::uint64_t kMinTableBytes = std::uint64_t{16} << 20;

}  // namespace

CacheReserve::~CacheReserve() { pool_->Return(free_); }

CacheBlock::~CacheBlock() { pool_->Free(*this); }

absl::StatusOr<BlockRef> CachePool::Allocate(std::uint64_t bytes,
                                             const std::shared_ptr<CacheReserve>& reserve) {
  bool reserved = false;
  {
    std::lock_guard lock(mutex_);
    reserved = reserve != nullptr && reserve->free_ >= bytes;
    if (reserved) {
      reserve->free_ -= bytes;
    } else {
      if (bytes > limit_ || used_ > limit_ - bytes) return Refusal(bytes, used_, limit_);
      used_ += bytes;
    }
    ++blocks_;
  }
  const auto undo = [&] {
    std::lock_guard lock(mutex_);
    (reserved ? reserve->free_ : used_) += reserved ? bytes : -bytes;
    --blocks_;
  };
  absl::StatusOr<Buffer> buffer = device_.Allocate(bytes);
  if (!buffer.ok()) {
    undo();
    return buffer.status();
  }
  auto* const block = new (std::nothrow)
      CacheBlock(shared_from_this(), reserved ? reserve : nullptr, *std::move(buffer));
  if (block == nullptr) {
    undo();
    return OutOfMemory();
  }
  return BlockRef(block);
}

absl::StatusOr<BlockRef> CachePool::AllocateCopy(const BlockRef& block, std::uint64_t bytes,
                                                 const std::shared_ptr<CacheReserve>& reserve) {
  ATTN_ASSIGN_OR_RETURN(BlockRef copy, Allocate(bytes, reserve));
  if (block) device_.Copy(copy->data(), block->data(), bytes);
  return copy;
}

absl::StatusOr<std::shared_ptr<CacheReserve>> CachePool::Reserve(std::uint64_t bytes) {
  // Empty, and before the lock is taken, which its end takes too.
  auto reserve = std::shared_ptr<CacheReserve>(new CacheReserve(shared_from_this(), 0));
  std::lock_guard lock(mutex_);
  if (bytes > limit_ || used_ > limit_ - bytes) return Refusal(bytes, used_, limit_);
  used_ += bytes;
  reserve->free_ = bytes;
  return reserve;
}

absl::Status CachePool::Refusal(std::uint64_t bytes, std::uint64_t used,
                                std::uint64_t limit) const {
  absl::Status status =
      MakeError(absl::StatusCode::kResourceExhausted, "CACHE_BUDGET",
                absl::StrCat("the cache needs ", bytes, " bytes more, but ", used, " of the ",
                             limit, " that caches may hold are in use"),
                {{"bytes", absl::StrCat(bytes)}, {"limit", absl::StrCat(limit)}});
  if (bytes <= limit) SetRetryDelay(status, kRetrySeconds);
  return status;
}

absl::Status CachePool::ChargeTables(std::uint64_t bytes) {
  const std::uint64_t limit = std::max(limit_ / kTableShare, kMinTableBytes);
  std::lock_guard lock(mutex_);
  if (bytes > limit || tables_ > limit - bytes) return Refusal(bytes, tables_, limit);
  tables_ += bytes;
  return absl::OkStatus();
}

void CachePool::ReturnTables(std::uint64_t bytes) {
  std::lock_guard lock(mutex_);
  tables_ -= bytes;
}

std::uint64_t CachePool::tables() const {
  std::lock_guard lock(mutex_);
  return tables_;
}

void CachePool::Free(const CacheBlock& block) {
  // Held until the lock is released: its end takes the lock too.
  const std::shared_ptr<CacheReserve> reserve = block.reserve_.lock();
  std::lock_guard lock(mutex_);
  --blocks_;
  if (reserve != nullptr) {
    reserve->free_ += block.bytes();
  } else {
    used_ -= block.bytes();
  }
}

void CachePool::Return(std::uint64_t bytes) {
  std::lock_guard lock(mutex_);
  used_ -= bytes;
}

std::uint64_t CachePool::used() const {
  std::lock_guard lock(mutex_);
  return used_;
}

std::uint64_t CachePool::blocks() const {
  std::lock_guard lock(mutex_);
  return blocks_;
}

}  // namespace attn
