// Sessions of two models and of none, and calls on them as the server makes them, without the
// attention itself: what tests of the cache share.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/cache_call.h"
#include "core/model_registry.h"
#include "core/session_table.h"
#include "tests/core/core_fixture.h"

namespace attn {

// Looks at what sessions hold, while no call runs on them.
class SessionInspector {
 public:
  static const std::map<CacheKey, LayerCache>& Layers(const Session& session) {
    return session.layers_;
  }
};

}  // namespace attn

namespace attn::testing {

// An element of token `id`'s key (elements from 0) or value (elements from kValueElements): a small
// multiple of 1/8, exact in every floating-point dtype and found again in int8, so that contents
// can be compared bit by bit.
inline constexpr std::int64_t kValueElements = 1000;
float TokenElement(std::int64_t id, std::int64_t head, std::int64_t element);

// Of one row of a call: the tokens it brings, by id, and its queries.
struct RowTokens {
  std::vector<std::int64_t> ids;
  std::int64_t queries = 0;
};

struct LayerCall {
  CacheKey key;
  CacheRequest request;
  std::vector<RowTokens> rows;
  CacheDims dims;                    // of queries, keys and values; their dtype is the rows' own
  DType dtype = DType::kFloat32;     // of queries, keys and values
  bool is_causal = true;             // without a model
  std::int64_t request_window = -1;  // of the request, over the layer's own
  bool commit = true;                // otherwise given up after the tokens were written
};

// Models "windows" (layers 0 and 1 with a window of 20, 2 without, 3 with one of 100; a
// cross-attention layer; caches in bfloat16) and "plain" (two layers in float16, no window).
class SessionFixture {
 public:
  explicit SessionFixture(std::uint64_t cache_bytes, std::size_t max_sessions = 65536);

  std::shared_ptr<ManagerPool> Pool(const std::string& model) { return *registry_.Find(model); }
  // Null without a model.
  const HostedLayer* Layer(const std::string& model, const CacheKey& key);
  // Of a model's layer; its dtype is unspecified.
  CacheDims DimsOfLayer(const std::string& model, const CacheKey& key);

  std::shared_ptr<Session> Open(const std::string& model, SessionOptions options = {});

  // Checks, memory, new tokens, publication, as a handler does it: the caches' lengths afterwards.
  absl::StatusOr<std::vector<std::int64_t>> Run(
      const std::vector<std::shared_ptr<Session>>& sessions, const LayerCall& call);

  // Empty where the layer's tokens from the first one that it holds are `ids` from there on;
  // otherwise what differs. `ids` counts tokens that were let go.
  static std::string Differs(const Session& session, const CacheKey& key,
                             const std::vector<std::int64_t>& ids);

  CachePool& pool() { return *cache_; }
  SessionTable& table() { return table_; }
  TestDevice& device() { return device_; }
  SessionClock::time_point now() const { return now_; }
  void Advance(double seconds);

 private:
  TestDevice device_;
  ModelRegistry registry_;
  std::shared_ptr<CachePool> cache_;
  SessionClock::time_point now_{};
  SessionTable table_;
};

}  // namespace attn::testing
