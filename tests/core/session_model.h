// What sessions are by the API's words, kept plainly: a list of token ids per session and layer,
// blocks as shared pointers. The model-based test compares it with the cache after each operation.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tests/core/session_fixture.h"

namespace attn::testing {

// OK, or code and reason of a refusal.
struct Outcome {
  absl::StatusCode code = absl::StatusCode::kOk;
  std::string reason;

  bool ok() const { return code == absl::StatusCode::kOk; }
  bool operator==(const Outcome&) const = default;
};
std::string ToText(const Outcome& outcome);

// The byte budget as a sum.
struct PlainPool {
  std::uint64_t limit = 0;
  std::uint64_t used = 0;
  std::uint64_t blocks = 0;
};

struct PlainReserve {
  PlainReserve(PlainPool& owner, std::uint64_t bytes) : pool(owner), free(bytes) {
    pool.used += bytes;
  }
  ~PlainReserve() { pool.used -= free; }
  PlainPool& pool;
  std::uint64_t free;
};

struct PlainBlock {
  PlainBlock(PlainPool& owner, std::uint64_t size, std::shared_ptr<PlainReserve> from);
  ~PlainBlock();
  PlainPool& pool;
  std::uint64_t bytes;
  std::weak_ptr<PlainReserve> reserve;
};

struct PlainLayer {
  std::vector<std::int64_t> tokens;  // those that were let go too
  std::int64_t first_token = 0;
  std::vector<std::shared_ptr<PlainBlock>> blocks;
  CacheDims dims;
  std::int64_t call_start = 0;
  std::int64_t call_query = 0;
  std::uint64_t last_step = 0;
  bool retryable = false;

  std::int64_t length() const { return static_cast<std::int64_t>(tokens.size()); }
};

struct PlainSession {
  std::string model;
  DType dtype = DType::kUnspecified;
  std::int64_t rollback_tokens = 64;
  double time_to_live_seconds = 0;
  SessionClock::time_point last_used;
  std::shared_ptr<PlainReserve> reserve;
  std::map<CacheKey, PlainLayer> layers;
};

// What a layer is like, without asking the code under test.
struct PlainLayerRule {
  std::int64_t window = -1;
  bool is_causal = true;
  CacheDims dims;  // of a model; unknown: of the first append
};

class SessionModel {
 public:
  explicit SessionModel(std::uint64_t limit) { pool_.limit = limit; }

  // Memory for `tokens` in these layers, and one block more, the largest.
  Outcome Reserve(PlainSession& session, const std::vector<CacheDims>& layers, std::int64_t tokens);

  using Rules = std::map<CacheKey, PlainLayerRule>;
  Outcome Fork(const PlainSession& parent, const Rules& rules, std::optional<std::int64_t> length,
               SessionClock::time_point now, PlainSession& fork) const;

  // Changes all sessions, or none.
  Outcome Run(const std::vector<PlainSession*>& sessions, const LayerCall& call,
              const PlainLayerRule& rule);

  const PlainPool& pool() const { return pool_; }
  // Of the last call that did not fit.
  std::size_t failed_row() const { return failed_row_; }

 private:
  struct Row {
    PlainSession* session = nullptr;
    const PlainLayer* layer = nullptr;
    std::int64_t start = 0;
    std::int64_t query_position = 0;
    std::vector<std::shared_ptr<PlainBlock>> blocks;  // afterwards
  };
  Outcome Start(Row& row, std::size_t index, const CacheRequest& request) const;
  Outcome CheckRows(const std::vector<PlainSession*>& sessions, const LayerCall& call,
                    const PlainLayerRule& rule, CacheDims& dims, std::vector<Row>& rows) const;
  Outcome Allocate(Row& row, const LayerCall& call, std::size_t index, const CacheDims& dims);
  void Publish(Row& row, const LayerCall& call, std::size_t index, const PlainLayerRule& rule,
               const CacheDims& dims);

  PlainPool pool_;
  std::size_t failed_row_ = 0;
};

}  // namespace attn::testing
