// A session: one sequence's key/value cache over all layers of its model. It owns page tables;
// forks share their blocks, which are copied before they are written to. What a call does to it is
// core/cache_call.h.
//
// Calls that name a session run one after the other (their order is the caller's affair), so that a
// running call may read the session's layers without its lock. The lock is for those who only look
// (GetSession, metrics) beside it.
#pragma once

#include <chrono>
#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/cache_pool.h"
#include "core/cached_rows.h"
#include "core/manager_pool.h"

namespace attn {

using SessionClock = std::chrono::steady_clock;

// Of a session's model, or of a session without one (stack empty, layers below
// kMaxLayersWithoutModel).
struct CacheKey {
  std::string stack;
  std::uint32_t layer = 0;
  AttentionKind kind = AttentionKind::kSelf;

  // The check takes the 0 that comparisons are made of for a pointer.
  auto operator<=>(const CacheKey&) const = default;  // NOLINT(modernize-use-nullptr)
};

inline constexpr std::uint32_t kMaxLayersWithoutModel = 1024;

struct LayerCache {
  CacheDims dims;
  std::vector<BlockRef> blocks;  // of 64 tokens each; null where all of them were let go
  std::int64_t held_blocks = 0;  // that are not null
  std::int64_t length = 0;       // tokens appended and not cut
  std::int64_t first_token = 0;  // the first one held
  // The last call that changed the cache: how long the cache was before its tokens, and the first
  // position that its queries stood at. A retry starts there.
  std::int64_t call_start = 0;
  std::int64_t call_query = 0;
  std::uint64_t last_step = 0;  // the largest number of a call
  bool retryable = false;       // the last call had that number
};

struct SessionOptions {
  DType cache_dtype = DType::kUnspecified;  // unset: the model's; without a model, that of the
                                            // first append
  std::uint64_t reserve_tokens = 0;
  double time_to_live_seconds = 0.0;
  std::uint64_t rollback_tokens = 0;
};

class Session {
 public:
  // RESOURCE_EXHAUSTED where reserve_tokens do not fit. `pool` is that of its model; that of
  // attention without a model otherwise.
  static absl::StatusOr<std::shared_ptr<Session>> Create(std::string id,
                                                         std::shared_ptr<ManagerPool> pool,
                                                         std::shared_ptr<CachePool> cache,
                                                         const SessionOptions& options,
                                                         SessionClock::time_point now);

  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const std::string& id() const { return id_; }
  const std::shared_ptr<ManagerPool>& pool() const { return pool_; }
  const std::string& model() const { return pool_->name(); }  // empty: none
  double time_to_live_seconds() const { return time_to_live_seconds_; }

  // A copy with the first `length` tokens (unset: all) of every self-attention layer, all tokens of
  // a layer that holds fewer, and cross-attention caches whole. OUT_OF_RANGE where the fork's next
  // query would see tokens that a window let go; RESOURCE_EXHAUSTED for its page tables.
  absl::StatusOr<std::shared_ptr<Session>> Fork(std::string id, std::optional<std::int64_t> length,
                                                SessionClock::time_point now) const;

  struct LayerState {
    CacheKey key;
    std::int64_t length;
    std::int64_t first_token;
    std::uint64_t last_step;
  };
  // Layers that hold tokens or have held some.
  std::vector<LayerState> Layers() const;
  std::uint64_t bytes() const;         // of its blocks, shared ones too
  std::int64_t longest_layer() const;  // in tokens

  // What calls do to it, and when: it can't expire in between. Begin is false once it is closed.
  bool BeginUse();
  void EndUse(SessionClock::time_point now);
  void Touch(SessionClock::time_point now);
  double idle_seconds(SessionClock::time_point now) const;
  double age_seconds(SessionClock::time_point now) const;
  bool Expired(SessionClock::time_point now) const;
  // From then on no call may begin to use it; false where it has not expired.
  bool EndIfExpired(SessionClock::time_point now);

  // No call may begin to use it any more. What it holds is freed when the last one that did is
  // done.
  void Close();
  bool closed() const;

 private:
  friend class CacheCall;
  friend class SessionInspector;  // of tests: blocks and their owners

  Session(std::string id, std::shared_ptr<ManagerPool> pool, std::shared_ptr<CachePool> cache,
          const SessionOptions& options, SessionClock::time_point now);
  struct Contents {
    std::map<CacheKey, LayerCache> layers;
    std::shared_ptr<CacheReserve> reserve;
  };
  // Memory of a layer beside its blocks, and of a fork's table of them.
  static std::uint64_t TableBytes(const LayerCache& layer);
  absl::Status ChargeTable(std::uint64_t bytes);
  // Under the lock.
  Contents TakeContents();
  double IdleSeconds(SessionClock::time_point now) const;
  // Of a model's layer; -1: none.
  std::int64_t WindowOf(const CacheKey& key) const;

  const std::string id_;
  const std::shared_ptr<ManagerPool> pool_;
  const std::shared_ptr<CachePool> cache_;
  const double time_to_live_seconds_;
  const std::int64_t rollback_tokens_;
  const SessionClock::time_point opened_;

  mutable std::mutex mutex_;
  std::shared_ptr<CacheReserve> reserve_;  // null: none
  std::uint64_t table_bytes_ = 0;          // charged to the pool
  DType dtype_;                            // of the cache; unspecified until the first append
  std::map<CacheKey, LayerCache> layers_;
  SessionClock::time_point last_used_;
  int in_use_ = 0;
  bool closed_ = false;
};

}  // namespace attn
