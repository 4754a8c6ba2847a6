// The part of ProblemBuilder for rows that lie in sessions.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/attention_problem_builder.h"
#include "core/error.h"

namespace attn {

absl::Status ProblemBuilder::CheckCacheDims() {
  if (inputs_.past_key.defined()) {
    return InvalidField("past_key_value", "past_key_value has both sessions and inline_kv");
  }
  const CacheDims& dims = inputs_.cache->dims;
  problem_.cache_dims_ = {key_.heads, key_.dim, value_.dim,
                          dims.dtype == DType::kUnspecified ? query_.dtype : dims.dtype};
  if (!dims.known()) return absl::OkStatus();
  for (const auto& [field, what, given, expected] :
       {std::tuple("key", "heads", key_.heads, dims.num_kv_heads),
        std::tuple("key", "head_dim", key_.dim, dims.head_dim),
        std::tuple("value", "value_dim", value_.dim, dims.value_dim)}) {
    if (given == expected) continue;
    return InvalidField(field, absl::StrCat(field, " has ", what, " ", given,
                                            ", but the session's cache has ", expected));
  }
  return absl::OkStatus();
}

absl::Status ProblemBuilder::CheckCachedRows() {
  const auto rows = static_cast<std::int64_t>(inputs_.cache->lengths.size());
  if (rows != batch_) {
    return InvalidField(
        "past_key_value.sessions.session_ids",
        absl::StrCat("past_key_value.sessions has ", rows, " session_ids for a batch of ", batch_));
  }
  if (brings_keys()) return absl::OkStatus();
  if (!inputs_.kv_lengths.empty()) {
    return InvalidField("kv_lengths", "kv_lengths is set, but a read-only call brings no keys");
  }
  return absl::OkStatus();
}

absl::Status ProblemBuilder::CheckVisible() const {
  for (std::size_t i = 0; i < problem_.sequences_.size(); ++i) {
    const kernels::Sequence& sequence = problem_.sequences_[i];
    const std::int64_t first = sequence.pages.first_token;
    const std::int64_t seen = FirstVisibleKey(problem_.args_, sequence);
    if (sequence.q_len == 0 || seen >= std::min(first, sequence.kv_len)) continue;
    // The cache as it is, not as this call would cut it.
    const std::int64_t held = inputs_.cache->cache_first_tokens[i];
    const std::int64_t length = inputs_.cache->cache_lengths[i];
    return MakeError(absl::StatusCode::kOutOfRange, "TOKENS_LET_GO",
                     absl::StrCat("row ", i, "'s queries would see tokens from ", seen,
                                  " on, but the layer's window has let go of those before ", held,
                                  "; the cache has length ", length),
                     {{"row", absl::StrCat(i)},
                      {"first_position", absl::StrCat(held)},
                      {"length", absl::StrCat(length)}});
  }
  return absl::OkStatus();
}

}  // namespace attn
