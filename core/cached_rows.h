// A batch's rows in sessions, as checks and kernels' arguments need them: what each row's cache
// holds when the call begins, and what becomes of the call's own tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace attn {

enum class CacheMode : std::uint8_t {
  kAppend,    // queries see the cache and the new tokens, which are kept
  kReadOnly,  // queries see the cache; the call brings no keys and values
  kDiscard,   // queries see the cache and the new tokens, which are not kept
};

// Of one layer's cache. A session without a model has those of its first append; until then they
// are 0 and unspecified.
struct CacheDims {
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  DType dtype = DType::kUnspecified;

  bool known() const { return num_kv_heads != 0; }
};

struct CachedRows {
  CacheDims dims;
  CacheMode mode = CacheMode::kAppend;
  std::vector<std::int64_t> lengths;       // tokens before this call's own
  std::vector<std::int64_t> first_tokens;  // those before were let go: no query may see them
  // Of the caches as they are, before a cut of this call: what an error tells.
  std::vector<std::int64_t> cache_lengths;
  std::vector<std::int64_t> cache_first_tokens;
};

}  // namespace attn
