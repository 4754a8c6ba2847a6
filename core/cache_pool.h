// The memory of one device's KV caches: a byte budget, and blocks that count their owners.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/status/statusor.h"
#include "core/device.h"

namespace attn {

class CachePool;

// Bytes of the budget that were set aside for one session. Its blocks are charged to it first, and
// give back to it; what is left returns to the pool when the session ends.
class CacheReserve {
 public:
  ~CacheReserve();
  CacheReserve(const CacheReserve&) = delete;
  CacheReserve& operator=(const CacheReserve&) = delete;

 private:
  friend class CachePool;
  CacheReserve(std::shared_ptr<CachePool> pool, std::uint64_t bytes)
      : pool_(std::move(pool)), free_(bytes) {}

  const std::shared_ptr<CachePool> pool_;
  std::uint64_t free_;  // guarded by the pool's mutex
};

// One allocation: 64 tokens of one layer, a page for each KV head. Forks share it; who is its only
// owner may write to it.
class CacheBlock {
 public:
  ~CacheBlock();
  CacheBlock(const CacheBlock&) = delete;
  CacheBlock& operator=(const CacheBlock&) = delete;

  void* data() const { return buffer_.data.get(); }
  std::uint64_t bytes() const { return buffer_.bytes; }

 private:
  friend class CachePool;
  friend class BlockRef;
  CacheBlock(std::shared_ptr<CachePool> pool, std::weak_ptr<CacheReserve> reserve, Buffer buffer)
      : pool_(std::move(pool)), reserve_(std::move(reserve)), buffer_(std::move(buffer)) {}

  const std::shared_ptr<CachePool> pool_;
  const std::weak_ptr<CacheReserve> reserve_;  // that it was charged to; expired or null: the pool
  const Buffer buffer_;
  std::atomic<std::int64_t> owners_{1};
};

// An owner of a block, or of none. Unlike std::shared_ptr's use_count, `only_owner` orders what
// earlier owners read before what this one writes.
class BlockRef {
 public:
  BlockRef() = default;
  BlockRef(const BlockRef& other) : block_(other.block_) {
    if (block_ != nullptr) block_->owners_.fetch_add(1, std::memory_order_relaxed);
  }
  BlockRef(BlockRef&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  BlockRef& operator=(BlockRef other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~BlockRef() {
    if (block_ != nullptr && block_->owners_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      delete block_;
    }
  }

  explicit operator bool() const { return block_ != nullptr; }
  CacheBlock* operator->() const { return block_; }
  const CacheBlock* get() const { return block_; }
  bool only_owner() const {
    return block_ != nullptr && block_->owners_.load(std::memory_order_acquire) == 1;
  }
  std::int64_t owners() const {
    return block_ == nullptr ? 0 : block_->owners_.load(std::memory_order_acquire);
  }

 private:
  friend class CachePool;
  explicit BlockRef(CacheBlock* block) : block_(block) {}

  CacheBlock* block_ = nullptr;
};

class CachePool : public std::enable_shared_from_this<CachePool> {
 public:
  CachePool(Device& device, std::uint64_t limit) : device_(device), limit_(limit) {}

  // Uninitialised. RESOURCE_EXHAUSTED (reason CACHE_BUDGET) beyond the budget, with a delay to
  // retry after where others' caches are in the way; OUT_OF_MEMORY where the device has none.
  absl::StatusOr<BlockRef> Allocate(std::uint64_t bytes,
                                    const std::shared_ptr<CacheReserve>& reserve);

  // A block of its own with what `block`, which may be null, holds.
  absl::StatusOr<BlockRef> AllocateCopy(const BlockRef& block, std::uint64_t bytes,
                                        const std::shared_ptr<CacheReserve>& reserve);

  // Sets `bytes` of the budget aside. RESOURCE_EXHAUSTED as above.
  absl::StatusOr<std::shared_ptr<CacheReserve>> Reserve(std::uint64_t bytes);

  // Counts the memory of page tables, which forks can have many of around few blocks.
  // RESOURCE_EXHAUSTED (reason CACHE_BUDGET) beyond a share of the budget.
  absl::Status ChargeTables(std::uint64_t bytes);
  void ReturnTables(std::uint64_t bytes);

  std::uint64_t limit() const { return limit_; }
  std::uint64_t used() const;    // blocks, and what is set aside
  std::uint64_t tables() const;  // beside them
  std::uint64_t blocks() const;  // that are alive

 private:
  friend class CacheBlock;
  friend class CacheReserve;
  absl::Status Refusal(std::uint64_t bytes, std::uint64_t used, std::uint64_t limit) const;
  void Free(const CacheBlock& block);
  void Return(std::uint64_t bytes);

  Device& device_;
  const std::uint64_t limit_;
  mutable std::mutex mutex_;
  std::uint64_t used_ = 0;
  std::uint64_t blocks_ = 0;
  std::uint64_t tables_ = 0;
};

}  // namespace attn
